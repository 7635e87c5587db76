"""Spans: what belongs to what, across processes too, and when none are made."""

import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from softprompt_api.errors import AdapterNotFound
from softprompt_api.settings import SettingsError
from softprompt_api.tracing import Tracer, carrier, open_tracer, serve, span

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
CARRIER = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=value"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine that runs the tests is told of tracing is not meant for them."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def ended() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(ended: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    tracer = Tracer(provider)
    yield tracer
    tracer.close()


def test_without_a_tracer_there_is_no_span() -> None:
    with serve(None, "request", CARRIER) as outer, span("part") as inner:
        assert (outer, inner, carrier()) == (None, None, {})


def test_parts_stand_under_what_they_are_parts_of(tracer: Tracer, ended: InMemorySpanExporter) -> None:
    with serve(tracer, "request", {}) as outer:
        assert outer is not None
        with span("first"), span("inner", "client"):
            pass
        with span("second"):
            outer.set({"status": 200})
        outer.rename("POST /route")
    spans = {one.name: one for one in ended.get_finished_spans()}
    assert set(spans) == {"POST /route", "first", "inner", "second"}
    root = spans["POST /route"]
    assert (root.parent, root.kind.name, dict(root.attributes)) == (None, "SERVER", {"status": 200})
    assert spans["first"].parent.span_id == spans["second"].parent.span_id == root.context.span_id
    assert spans["inner"].parent.span_id == spans["first"].context.span_id
    assert spans["inner"].kind.name == "CLIENT"
    assert len({one.context.trace_id for one in spans.values()}) == 1
    assert carrier() == {}, "none is current any more"


def test_a_trace_goes_on_from_one_process_to_the_next(tracer: Tracer, ended: InMemorySpanExporter) -> None:
    with serve(tracer, "here", CARRIER):
        told = carrier()
    assert told["tracestate"] == "vendor=value"
    with serve(tracer, "there", told):
        pass
    here, there = ended.get_finished_spans()
    assert f"{here.context.trace_id:032x}" == f"{there.context.trace_id:032x}" == TRACE_ID
    assert f"{here.parent.span_id:016x}" == PARENT_ID
    assert there.parent.span_id == here.context.span_id


@pytest.mark.parametrize("odd", ["", "00-0-0-00", "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01", "é" * 1000])
def test_what_is_no_trace_begins_one(tracer: Tracer, ended: InMemorySpanExporter, odd: str) -> None:
    with serve(tracer, "outer", {}), serve(tracer, "request", {"traceparent": odd}):
        pass
    request, outer = ended.get_finished_spans()
    assert request.parent is None
    assert request.context.trace_id != outer.context.trace_id


def test_a_client_that_does_not_sample_is_followed(tracer: Tracer, ended: InMemorySpanExporter) -> None:
    with serve(tracer, "request", {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}), span("part"):
        assert carrier()["traceparent"].endswith("-00")
    assert ended.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(AdapterNotFound("secret"), "ADAPTER_NOT_FOUND"), (ZeroDivisionError("secret"), "ZeroDivisionError")],
)
def test_an_error_is_told_by_its_kind_alone(
    tracer: Tracer, ended: InMemorySpanExporter, error: Exception, reason: str
) -> None:
    with pytest.raises(type(error)), serve(tracer, "request", {}), span("part"):
        raise error
    for one in ended.get_finished_spans():
        assert one.attributes["error.type"] == reason
        assert one.status.status_code.name == "ERROR"
        assert "secret" not in one.to_json()


def test_a_part_that_is_over_keeps_its_times(tracer: Tracer, ended: InMemorySpanExporter) -> None:
    with serve(tracer, "request", {}) as outer:
        assert outer is not None
        outer.add("decode", 1.0, 3.5)
    part, root = ended.get_finished_spans()
    assert part.end_time - part.start_time == pytest.approx(2.5e9, abs=1000)
    assert part.parent.span_id == root.context.span_id


class TestOpening:
    """OpenTelemetry's own variables say whether there is a tracer."""

    @pytest.mark.parametrize(
        "variables",
        [
            {},
            {"OTEL_SERVICE_NAME": "x"},
            {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
            {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        ],
    )
    def test_without_a_collector_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert open_tracer("softprompt-registry") is None

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'; otlp and none are known"),
            ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "is 'grpc'; http/protobuf is known"),
        ],
    )
    def test_what_there_is_not_is_refused_by_name(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
    ) -> None:
        for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", **variables}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError, match=message):
            open_tracer("softprompt-registry")

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
        with pytest.raises(SettingsError, match=r"pip install 'softprompt\[otel\]'"):
            open_tracer("softprompt-registry")

    def test_a_collector_gets_the_spans(self, monkeypatch: pytest.MonkeyPatch, collector: "Collector") -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        tracer = open_tracer("softprompt-registry")
        assert tracer is not None
        with serve(tracer, "request", CARRIER), span("part"):
            pass
        tracer.close()
        [(service, names)] = collector.spans()
        assert (service, sorted(names)) == ("softprompt-registry", ["part", "request"])

    def test_a_name_that_was_given_is_kept(self, monkeypatch: pytest.MonkeyPatch, collector: "Collector") -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        tracer = open_tracer("softprompt-registry")
        with serve(tracer, "request", {}):
            pass
        assert tracer is not None
        tracer.close()
        assert collector.spans() == [("mine", ["request"])]


class Collector:
    """Takes spans as OpenTelemetry's collector does, over HTTP."""

    def __init__(self) -> None:
        self._bodies: list[bytes] = []
        bodies = self._bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[tuple[str, list[str]]]:
        """Services with the names of their spans."""
        found = []
        for body in self._bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                spans = [one.name for scope in resource.scope_spans for one in scope.spans]
                found.append((names["service.name"], spans))
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join()
