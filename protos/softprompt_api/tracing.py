"""Traces of requests through all services: spans of OpenTelemetry, where its variables say who collects them.

A span is current for the task that works on it, and for tasks that this one starts. Where none is, as always
without tracing, no part of it is made: to ask costs a look at one variable.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

from softprompt_api.settings import SettingsError

Kind = Literal["internal", "client", "server"]
Value = str | int | float | bool

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_NO_SPAN = nullcontext()
_current: ContextVar["Span | None"] = ContextVar("softprompt_span", default=None)


class Span:
    """A piece of work that is being done.

    Args:
        carrier: where it stands in a trace, as W3C's headers `traceparent` and `tracestate`; none: it begins one.
    """

    def __init__(
        self,
        tracer: "Tracer",
        name: str,
        kind: Kind,
        *,
        carrier: Mapping[str, str] | None = None,
        parent: Any = None,
    ) -> None:
        self._tracer = tracer
        self._span, self._context = tracer.begin(name, kind, tracer.read(carrier) if parent is None else parent)
        # Parts are told with times of perf_counter; OpenTelemetry's count from 1970.
        self._epoch_s = time.time() - time.perf_counter()

    def rename(self, name: str) -> None:
        """Give it another name, before it ends."""
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Facts about it."""
        self._span.set_attributes(attributes)

    def fail(self, reason: str) -> None:
        """It ended badly; `reason` is no text from a request."""
        self._tracer.fail(self._span, reason)

    def carrier(self) -> dict[str, str]:
        """Where it stands in its trace, for others who work on a part of it."""
        return self._tracer.write(self._context)

    def child(self, name: str, kind: Kind) -> "Span":
        """A part of it that begins now."""
        return Span(self._tracer, name, kind, parent=self._context)

    def add(self, name: str, began_s: float, ended_s: float) -> None:
        """A part of it that is over; times are of time.perf_counter."""
        span, _ = self._tracer.begin(name, "internal", self._context, self._nanoseconds(began_s))
        span.end(self._nanoseconds(ended_s))

    def end(self) -> None:
        """It is done."""
        self._span.end()

    def _nanoseconds(self, perf_s: float) -> int:
        return round((self._epoch_s + perf_s) * 1e9)


class Tracer:
    """Makes spans, and sends them off in the background.

    Args:
        provider: a TracerProvider of OpenTelemetry's SDK; closed with this.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._nothing = Context()
        self._provider = provider
        self._tracer = provider.get_tracer("softprompt")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()

    def begin(self, name: str, kind: Kind, context: Any, start_ns: int | None = None) -> tuple[Any, Any]:
        """OpenTelemetry's own span under a context, and the context of its parts."""
        span = self._tracer.start_span(
            name, context=context, kind=self._api.SpanKind[kind.upper()], start_time=start_ns
        )
        return span, self._api.set_span_in_context(span, self._nothing)

    def read(self, carrier: Mapping[str, str] | None) -> Any:
        """The context that W3C's headers tell; an empty one where they make no sense."""
        return self._propagator.extract(carrier or {}, context=self._nothing)

    def write(self, context: Any) -> dict[str, str]:
        """W3C's headers for a context."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=context)
        return carrier

    def fail(self, span: Any, reason: str) -> None:
        """Mark OpenTelemetry's own span."""
        span.set_attribute("error.type", reason)
        span.set_status(self._api.Status(self._api.StatusCode.ERROR))


def open_tracer(service: str) -> Tracer | None:
    """A tracer for a service, where OpenTelemetry's variables name a collector; otherwise None.

    SettingsError where they ask for what there is not.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    is_wanted = exporter == "otlp" or any(os.environ.get(name) for name in _ENDPOINTS)
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none" or not is_wanted:
        return None
    if exporter not in ("", "otlp"):
        raise SettingsError(f"OTEL_TRACES_EXPORTER is {exporter!r}; otlp and none are known")
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise SettingsError(f"the protocol of OTEL_EXPORTER_OTLP is {protocol!r}; {_PROTOCOL} is known")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise SettingsError(
            "OpenTelemetry's variables ask for traces: pip install 'softprompt[otel]', or OTEL_SDK_DISABLED=true"
        ) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    # Ours alone: a global one would make other libraries tell what they please, too.
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


def serve(tracer: Tracer | None, name: str, carrier: Mapping[str, str]) -> AbstractContextManager[Span | None]:
    """Work that somebody else asked for: a span under theirs, current within; None without a tracer."""
    return _NO_SPAN if tracer is None else _worked_on(Span(tracer, name, "server", carrier=carrier))


def span(name: str, kind: Kind = "internal") -> AbstractContextManager[Span | None]:
    """A part of what is being worked on, current within; None where no span is current."""
    parent = _current.get()
    return _NO_SPAN if parent is None else _worked_on(parent.child(name, kind))


def carrier() -> dict[str, str]:
    """Where the current span stands in its trace, for another service; nothing where none is current."""
    current = _current.get()
    return {} if current is None else current.carrier()


@contextmanager
def _worked_on(made: Span) -> Iterator[Span]:
    before = _current.get()
    _current.set(made)
    try:
        yield made
    except Exception as error:
        made.fail(getattr(error, "reason", type(error).__name__))
        raise
    finally:
        # Not by a token: what is broken off may be ended in another context.
        _current.set(before)
        made.end()
