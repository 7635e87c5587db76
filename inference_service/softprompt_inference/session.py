"""Many generations over one stream: what they say in one turn of the event loop travels in one message.

    requests → one task per generation → the batch → message → …

A batch is handed out as soon as the transport takes it. While it does not, the batch grows to a bound; beyond it
generations wait, and their outputs gather in the engine's client as they would behind a stream of their own.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import structlog
from softprompt_api.errors import InternalError, InvalidArgument, SoftpromptError, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb

_log = structlog.get_logger()

Generate = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse, None]]

# Far below the transport's limit: one further event may come on top.
_FULL_BYTES = 2**20


class Session:
    """One GenerateMany stream.

    Args:
        generate: the responses of one generation; closing the iterator aborts it.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._calls: dict[int, _Call] = {}
        self._batch = pb.GenerateManyResponse()
        self._batch_bytes = 0
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False  # takes no further generations

    async def serve(
        self, requests: AsyncIterator[pb.GenerateManyRequest]
    ) -> AsyncGenerator[pb.GenerateManyResponse, None]:
        """Messages until no generation is left and none can come; InvalidArgument for a message without sense."""
        reading = asyncio.create_task(self._read(requests))
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                while self._batch_bytes:
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
            self._put(pb.CallEvent(call=number, end=_end(Unavailable("the service is stopping; try again"))))
            return
        self._calls[number] = call = _Call()
        call.task = asyncio.create_task(self._run(number, call, request))

    def _signal(self, number: int, signal: "pb.CallSignal.ValueType") -> None:
        call = self._calls.get(number)
        if call is None:
            return
        if signal == pb.CALL_SIGNAL_CANCEL:
            call.task.cancel()
        elif signal == pb.CALL_SIGNAL_PAUSE:
            call.may_send.clear()
        elif signal == pb.CALL_SIGNAL_RESUME:
            call.may_send.set()

    async def _run(self, number: int, call: "_Call", request: pb.GenerateRequest) -> None:
        try:
            end = await self._send_all(number, call, request)
        finally:
            del self._calls[number]
            self._changed.set()
        self._put(pb.CallEvent(call=number, end=end))

    async def _send_all(self, number: int, call: "_Call", request: pb.GenerateRequest) -> pb.CallEnd:
        """Send the responses of one generation; how it ended."""
        try:
            async with aclosing(self._generate(request)) as responses:
                async for response in responses:
                    self._put(pb.CallEvent(call=number, response=response))
                    # Waiting comes after sending: what is generated meanwhile is not asked for, and so gathers.
                    while not (self._has_room.is_set() and call.may_send.is_set()):
                        await self._has_room.wait()
                        await call.may_send.wait()
        except Exception as error:
            return _end(error)
        return pb.CallEnd()

    def _put(self, event: pb.CallEvent) -> None:
        self._batch.events.append(event)
        self._batch_bytes += event.ByteSize()
        if self._batch_bytes >= _FULL_BYTES:
            self._has_room.clear()
        self._changed.set()

    def _take(self) -> pb.GenerateManyResponse:
        batch, self._batch, self._batch_bytes = self._batch, pb.GenerateManyResponse(), 0
        self._has_room.set()
        return batch


class _Call:
    """A running generation; its task is set right after it is made."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.may_send = asyncio.Event()
        self.may_send.set()


def _end(error: Exception) -> pb.CallEnd:
    """How a failed generation is told: as the interceptor tells a failed Generate."""
    if not isinstance(error, SoftpromptError):
        _log.exception("call failed", method="GenerateMany", exc_info=error)
        error = InternalError("internal error; the service's log has the details")
    return pb.CallEnd(reason=error.reason, message=error.message, field=error.field, details=error.details)
