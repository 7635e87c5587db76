"""One trace for a request: from its client through the gateway to the services behind it."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from softprompt_api.tracing import Tracer
from softprompt_gateway.settings import Settings
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings as RegistrySettings

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


@pytest.fixture
def ended() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(ended: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    with contextlib.closing(Tracer(provider)) as tracer:
        yield tracer


@pytest.fixture
async def http(stack: Any, running_gateway: Any, tracer: Tracer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that is traced, over the stack's services."""
    addresses = {name: getattr(stack.settings, name) for name in ("registry_address", "inference_address")}
    async with (
        running_gateway(Settings(grace_s=1, **addresses), tracer) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}", timeout=10) as http,
    ):
        yield http


def named(ended: InMemorySpanExporter, name: str) -> ReadableSpan:
    [found] = [span for span in ended.get_finished_spans() if span.name == name]
    return found


async def test_a_request_is_a_part_of_its_clients_trace_and_goes_on_to_the_inference_service(
    stack: Any, http: httpx.AsyncClient, ended: InMemorySpanExporter
) -> None:
    await stack.registry.add("loud")
    body = {"model": "loud", "prompt": "secret words", "max_tokens": 100}
    for stream in (False, True):
        ended.clear()
        answer = await http.post(
            "/v1/completions", json={**body, "stream": stream}, headers={**CLIENT, "x-request-id": "mine"}
        )
        assert answer.status_code == 200
        request, resolve = named(ended, "POST /v1/completions"), named(ended, "resolve")
        assert f"{request.context.trace_id:032x}" == TRACE_ID
        assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
        assert resolve.parent.span_id == request.context.span_id
        asked = named(ended, "softprompt_api.registry.v1.GetAdapter")
        assert asked.parent.span_id == resolve.context.span_id
        told = stack.inference.requests[-1].trace_context["traceparent"]
        assert told == f"00-{TRACE_ID}-{request.context.span_id:016x}-01"
        facts = {
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
            "softprompt.request_id": "mine",
            "softprompt.adapters": "loud@1",
            "softprompt.prompt_tokens": 12,
        }
        assert {name: request.attributes[name] for name in facts} == facts
        assert "secret" not in "".join(span.to_json() for span in ended.get_finished_spans())


async def test_what_fails_is_marked_and_health_checks_are_not_traced(
    stack: Any, http: httpx.AsyncClient, ended: InMemorySpanExporter
) -> None:
    assert (await http.get("/health/ready")).status_code == 200
    assert ended.get_finished_spans() == ()
    body = {"model": stack.base, "prompt": "refuse UNAVAILABLE"}
    assert (await http.post("/v1/completions", json=body)).status_code == 503
    failed = named(ended, "POST /v1/completions")
    assert (failed.parent, failed.status.status_code.name) == (None, "ERROR")
    assert (await http.get("/v1/models/nothing")).status_code == 404
    assert named(ended, "GET /v1/models/{id_:path}").status.status_code.name == "UNSET"


async def test_a_gateway_without_a_tracer_tells_of_no_trace(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "hello"}
    await stack.http.post("/v1/completions", json=body, headers=CLIENT)
    assert dict(stack.inference.requests[-1].trace_context) == {}


async def test_the_registrys_part_stands_under_the_gateways_question(
    stack: Any, running_gateway: Any, store: Any, tracer: Tracer, ended: InMemorySpanExporter
) -> None:
    await store.ready()
    settings = RegistrySettings(address="127.0.0.1:0", redis_url=store.url, grace_s=0)
    async with RegistryServer(settings, tracer) as registry:
        addresses = {"registry_address": f"127.0.0.1:{registry.port}"}
        addresses["inference_address"] = stack.settings.inference_address
        async with (
            running_gateway(Settings(grace_s=1, **addresses), tracer) as running,
            httpx.AsyncClient() as http,
        ):
            ended.clear()
            answer = await http.get(f"http://127.0.0.1:{running.port}/v1/models/nothing", headers=CLIENT)
    assert answer.status_code == 404
    asked = named(ended, "softprompt_api.registry.v1.GetAdapter")
    answered = named(ended, "softprompt_api.registry.v1.RegistryService/GetAdapter")
    assert answered.parent.span_id == asked.context.span_id
    assert f"{answered.context.trace_id:032x}" == TRACE_ID
    assert answered.attributes["error.type"] == "ADAPTER_NOT_FOUND"


async def test_nothing_is_sent_to_what_the_process_has_for_traces_beside_ours(
    stack: Any, ended: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
    assert (await stack.http.get("/v1/models")).status_code == 200
    assert (
        await stack.http.post("/v1/completions", json={"model": "nobody", "prompt": "secret"})
    ).status_code == 404
    assert ended.get_finished_spans() == ()
