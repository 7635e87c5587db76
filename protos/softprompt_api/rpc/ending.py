"""The status that a server ended a call with, kept from what grpc.aio makes of it.

A write that fails because the call has ended makes grpc.aio replace the server's status by INTERNAL
(https://github.com/grpc/grpc/issues/36066). Whoever writes to a stream that the server may end first looks here.
"""

from collections.abc import Awaitable, Generator
from typing import Any, TypeVar, cast

import grpc

Value = TypeVar("Value")


class Ending:
    """Remembers how the server ended a call that is being written to."""

    def __init__(self, call: grpc.aio.Call) -> None:
        self._told: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._remember)

    def of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """What the call failed with: `error`, or the server's own where grpc.aio put INTERNAL in its place."""
        return self._told if self._told is not None and error.code() is grpc.StatusCode.INTERNAL else error

    def _remember(self, call: grpc.aio.Call) -> None:
        # At once: a task would run after the status has been replaced, for which this is called again.
        code = _at_once(call.code())
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL):
            self._told = grpc.aio.AioRpcError(
                code,
                grpc.aio.Metadata(),  # the initial one, which may still be on its way
                _at_once(call.trailing_metadata()),
                details=_at_once(call.details()),
            )


def _at_once(awaitable: Awaitable[Value]) -> Value:
    """The value of an awaitable that has nothing to wait for."""
    steps: Generator[Any, None, Value] = cast(Generator[Any, None, Value], awaitable.__await__())
    try:
        next(steps)
    except StopIteration as end:
        return cast(Value, end.value)
    raise RuntimeError("the call has not ended")
