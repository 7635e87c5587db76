"""Many generations over one stream: what they say in one turn of the event loop travels in one message.

    requests → one task per generation, for its beginning and its end
    the engine's step → every generation it has outputs for → the batch → message → …

A batch is handed out as soon as the transport takes it. While it does not, the batch grows to a bound; beyond it
nothing is taken from generations, and their outputs gather in the engine's client, as far as that lets them.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Generic, Protocol, TypeVar

import structlog
from softprompt_api.errors import InternalError, InvalidArgument, SoftpromptError, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_inference.batch import Batch

_log = structlog.get_logger()

# Far below the transport's limit: one further look at a generation may come on top.
_FULL_BYTES = 2**20

Event = TypeVar("Event")
EventOut = TypeVar("EventOut", covariant=True)


class Generation(Protocol[EventOut]):
    """A generation that runs; see `softprompt_inference.generation.Generation`."""

    @property
    def has_more(self) -> bool: ...
    @property
    def has_ended(self) -> bool: ...
    def follow(self, notify: Callable[[], None]) -> None: ...
    def take(self) -> Sequence[EventOut]: ...


class Session(Generic[Event]):
    """One GenerateMany stream.

    Args:
        start: a generation for the time of a context; leaving the context aborts it.
        write: writes one event of a generation into a response.
    """

    def __init__(
        self,
        start: Callable[[pb.GenerateRequest], AbstractAsyncContextManager[Generation[Event]]],
        write: Callable[[Event, pb.GenerateResponse], None],
    ) -> None:
        self._start_generation = start
        self._calls: dict[int, _Call[Event]] = {}
        self._kept_back: dict[_Call[Event], None] = {}  # have something to say and no room for it
        self._batch = Batch(write)
        self._changed = asyncio.Event()
        self._is_closed = False  # takes no further generations

    async def serve(
        self, requests: AsyncIterator[pb.GenerateManyRequest]
    ) -> AsyncGenerator[pb.GenerateManyResponse, None]:
        """Messages until no generation is left and none can come; InvalidArgument for a message without sense."""
        reading = asyncio.create_task(self._read(requests))
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                while self._batch.num_bytes:
                    yield self._take()
                if reading.done():
                    reading.result()
                if self._is_closed and not self._calls:
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            tasks = [reading, *(call.task for call in self._calls.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Refuse further generations, and end after the last that runs."""
        self._is_closed = True
        self._changed.set()

    async def _read(self, requests: AsyncIterator[pb.GenerateManyRequest]) -> None:
        async for request in requests:
            match request.WhichOneof("action"):
                case "start":
                    self._start(request.call, request.start)
                case "signal":
                    self._signal(request.call, request.signal)
                case _:
                    raise InvalidArgument("a message has no action", field="action")
        self.close()

    def _start(self, number: int, request: pb.GenerateRequest) -> None:
        if number in self._calls:
            raise InvalidArgument(f"call {number} is in use", field="call")
        if self._is_closed:
            self._put_end(number, _how(Unavailable("the service is stopping; try again")))
            return
        call = self._calls[number] = _Call[Event](number)
        call.task = asyncio.create_task(self._run(call, request))
        # Not by the task: one that is cancelled before its first turn does nothing.
        call.task.add_done_callback(lambda _: self._forget(call))

    def _signal(self, number: int, signal: "pb.CallSignal.ValueType") -> None:
        call = self._calls.get(number)
        if call is None:
            return
        if signal == pb.CALL_SIGNAL_CANCEL:
            call.task.cancel()
        elif signal == pb.CALL_SIGNAL_PAUSE:
            call.may_send = False
        elif signal == pb.CALL_SIGNAL_RESUME:
            call.may_send = True
            if call.generation is not None:
                self._send(call, call.generation)

    async def _run(self, call: "_Call[Event]", request: pb.GenerateRequest) -> None:
        try:
            async with self._start_generation(request) as generation:
                call.generation = generation
                generation.follow(partial(self._send, call, generation))
                await call.ended
        except Exception as error:
            self._end(call, _how(error))

    def _forget(self, call: "_Call[Event]") -> None:
        del self._calls[call.number]
        self._kept_back.pop(call, None)
        self._changed.set()

    def _send(self, call: "_Call[Event]", generation: Generation[Event]) -> None:
        """Send what a generation has to say now, as far as it may; its errors end the call, not the caller."""
        try:
            while generation.has_more and call.may_send and not call.ended.done():
                if self._batch.num_bytes >= _FULL_BYTES:
                    self._kept_back[call] = None
                    return
                for event in (events := generation.take()):
                    self._batch.add(call.number, event)
                if generation.has_ended:
                    self._end(call, pb.CallEnd())
                elif not events:
                    return
                self._changed.set()
        except Exception as error:
            self._end(call, _how(error))

    def _end(self, call: "_Call[Event]", end: pb.CallEnd) -> None:
        """Tell a call's end with the last that it says; its task ends on its own."""
        if not call.ended.done():
            call.ended.set_result(None)
            self._put_end(call.number, end)

    def _put_end(self, number: int, end: pb.CallEnd) -> None:
        self._batch.end(number, end)
        self._changed.set()

    def _take(self) -> pb.GenerateManyResponse:
        message = self._batch.take()
        kept_back, self._kept_back = self._kept_back, {}
        for call in kept_back:
            assert call.generation is not None, "it had something to say"
            self._send(call, call.generation)
        return message


class _Call(Generic[Event]):
    """A running generation; its task is set right after it is made."""

    task: asyncio.Task[None]

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation: Generation[Event] | None = None
        self.may_send = True
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _how(error: Exception) -> pb.CallEnd:
    """How a failed generation is told: as the interceptor tells a failed Generate."""
    if not isinstance(error, SoftpromptError):
        _log.exception("call failed", method="GenerateMany", exc_info=error)
        error = InternalError("internal error; the service's log has the details")
    return pb.CallEnd(reason=error.reason, message=error.message, field=error.field, details=error.details)
