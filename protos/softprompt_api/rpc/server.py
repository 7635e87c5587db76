"""What every gRPC server of ours has: health, reflection, errors as statuses, and a graceful stop."""

import asyncio
import inspect
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from softprompt_api.errors import InternalError, InvalidArgument, SoftpromptError
from softprompt_api.rpc.channel import SERVER_OPTIONS
from softprompt_api.rpc.context import enter_call
from softprompt_api.rpc.status import to_status
from softprompt_api.rpc.tls import ServerTls
from softprompt_api.rpc.tracing import TracingInterceptor
from softprompt_api.tracing import Tracer

_log = structlog.get_logger()
# Stands for bytes that are no message: gRPC would end the call with UNKNOWN and the text of the exception.
_UNDECODABLE = object()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turn every SoftpromptError into its status, and every other exception into INTERNAL without its text.

    Bytes that are no message of the method are an InvalidArgument. Log lines of a call have the id of the request
    that it is made for.
    """

    def __init__(self) -> None:
        # By method: the handler that was wrapped, nearly always the same one, and its wrapping.
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        enter_call(handler_call_details.invocation_metadata)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:
            wrapped = _wrap(method, handler)
            self._wrapped[method] = (handler, wrapped)
        return wrapped


def _wrap(method: str, handler: Any) -> Any:
    check = _all_decoded if handler.request_streaming else _decoded
    wrap = _streaming if handler.response_streaming else _unary
    return handler._replace(
        request_deserializer=_decoder(handler.request_deserializer),
        **{name: wrap(method, getattr(handler, name), check) for name in _behaviours(handler)},
    )


def _behaviours(handler: Any) -> list[str]:
    names = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    return [name for name in names if getattr(handler, name) is not None]


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_tell(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return _UNDECODABLE

    return decode_or_tell


def _decoded(request: Any) -> Any:
    if request is _UNDECODABLE:
        raise InvalidArgument("the bytes are not a message of this method")
    return request


async def _all_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


def _unary(
    method: str, behaviour: Callable[..., Awaitable[Any]], check: Callable[[Any], Any]
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(check(request), context)
        except Exception as error:
            await _abort(method, error, context)

    return call


def _streaming(method: str, behaviour: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(behaviour):  # it writes its responses itself, as the health service does
        return _unary(method, behaviour, check)

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(check(request), context):
                yield response
        except Exception as error:
            await _abort(method, error, context)

    return call


async def _abort(method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, SoftpromptError):
        _log.exception("call failed", method=method)
        error = InternalError("internal error; the service's log has the details")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


class ServiceServer:
    """A gRPC server on one address, with health and reflection.

    Args:
        address: `host:port`; port 0 picks a free one, told by `port` after `start`.
        services: descriptors of the services added through `server`, for reflection and health.
        tls: how it proves who it is; None: without TLS.
        tracer: traces calls; None: nobody does.
    """

    def __init__(
        self,
        address: str,
        services: Sequence[ServiceDescriptor],
        tls: ServerTls | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        # The first is the outermost.
        traced = [] if tracer is None else [TracingInterceptor(tracer)]
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor(), *traced], options=list(SERVER_OPTIONS))
        self._address = address
        self._tls = tls
        self._names = [service.full_name for service in services]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflected = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(reflected, self.server)
        self.port = 0

    async def start(self, *, serving: bool = True) -> None:
        """Listen; OSError names the address when it is taken."""
        try:
            self.port = (
                self.server.add_insecure_port(self._address)
                if self._tls is None
                else self.server.add_secure_port(self._address, self._tls.grpc_credentials())
            )
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: is another service running there?") from error
        await self.set_serving(serving)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks, for the whole server and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, then let running calls end within the grace, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def wait_for_stop_signal() -> None:
    """Return at the first SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
