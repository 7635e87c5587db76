"""A span for every call that a server of ours answers; of those that stay open, for what is asked over them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from softprompt_api import tracing

_TRACED = "/softprompt_api."
_LASTING = ("/WatchAdapters", "/HoldLease", "/ReadTensors", "/GenerateMany")
_HEADERS = frozenset({"traceparent", "tracestate"})


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Traces calls."""

    def __init__(self, tracer: tracing.Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler, traced."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(_TRACED) or method.endswith(_LASTING):
            return handler
        name = method.removeprefix("/")
        metadata = handler_call_details.invocation_metadata or ()
        carrier = {key: str(value) for key, value in metadata if key in _HEADERS}
        wrap = self._streaming if handler.response_streaming else self._unary
        return handler._replace(
            **{
                kind: wrap(name, carrier, behaviour)
                for kind in ("unary_unary", "unary_stream", "stream_unary")
                if (behaviour := getattr(handler, kind)) is not None
            }
        )

    def _unary(
        self, name: str, carrier: dict[str, str], behaviour: Callable[..., Awaitable[Any]]
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            with serve_call(self._tracer, name, carrier):
                return await behaviour(request, context)

        return call

    def _streaming(
        self, name: str, carrier: dict[str, str], behaviour: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with serve_call(self._tracer, name, carrier):
                async for response in behaviour(request, context):
                    yield response

        return call


@contextmanager
def serve_call(tracer: tracing.Tracer | None, name: str, carrier: Mapping[str, str]) -> Iterator[None]:
    """Work on a call, or on what a message of it asks for: a span `service/method` under the caller's."""
    with tracing.serve(tracer, name, carrier) as span:
        if span is not None:
            span.set({"rpc.system": "grpc"})
        yield
