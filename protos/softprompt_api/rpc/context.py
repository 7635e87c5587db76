"""What a call carries beside its message: the id of the request that it is made for, and its place in a trace.

An id is for logs, and is never an identity.
"""

import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import grpc
from structlog.contextvars import bind_contextvars, unbind_contextvars

from softprompt_api import tracing

Request = TypeVar("Request")
Response = TypeVar("Response")

_ID_KEY = "x-request-id"
# As HTTP clients may spell it, and as gRPC can carry it.
_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
# What a call tells of its request, where its id can be told.
_told: ContextVar[Sequence[tuple[str, str]]] = ContextVar("softprompt_told", default=())


def enter_request(request_id: str) -> None:
    """Have an id in every log line of this task, and of tasks that it starts from now on."""
    bind_contextvars(request_id=request_id)
    _told.set(((_ID_KEY, request_id),) if _ID.match(request_id) else ())


def enter_call(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Work, in this task, for the request that a call tells of, and for no other; what is no id is passed by."""
    unbind_contextvars("request_id")
    _told.set(())
    for key, value in metadata or ():
        if key == _ID_KEY and isinstance(value, str) and _ID.match(value):
            enter_request(value)


def outgoing() -> Sequence[tuple[str, str]]:
    """Metadata for a call that is made for the request which this task works on."""
    return (*_told.get(), *tracing.carrier().items())


async def ask(
    method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]", request: Request, *, timeout_s: float
) -> Response:
    """Call a method for the request which this task works on."""
    with tracing.span(_name_of(request), "client"):
        return await method(request, timeout=timeout_s, metadata=outgoing())


def _name_of(request: Any) -> str:
    """The method's name, which its request has too."""
    return str(request.DESCRIPTOR.full_name).removesuffix("Request")
