"""Generate calls over one GenerateMany stream: a message per step of the engine, not one per token and call.

Whoever follows a call is told where the message is read, in the same turn of the event loop. Calls whose stream
breaks, or whose service cannot serve them, go on over another stream as long as they have said nothing.
"""

import asyncio
import contextvars
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from softprompt_api.errors import DeadlineExceeded, InternalError, SoftpromptError, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1 import inference_pb2_grpc as pb_grpc
from softprompt_api.rpc.ending import Ending
from softprompt_api.rpc.status import BY_REASON

from softprompt_gateway.statuses import translate

# Responses of each choice that may wait for a reader before the service is told to hold the rest back.
_MAX_WAITING = 64
# gRPC announces that a connection of some age ends, and lets calls on it end: later ones belong on another.
_MAX_AGE_S = 60.0


@dataclass(slots=True)
class Delta:
    """New output of one choice."""

    text: str
    index: int = 0
    token_ids: Sequence[int] = ()
    logprobs: Sequence[pb.TokenLogprob] = ()


Event = pb.Accepted | pb.PromptLogprobs | Delta | pb.Finished | pb.Usage


class Calls:
    """Generate calls that belong together, by the numbers of their requests: what any of them says, in one queue.

    One reader only. It ends with the first error of any call, or with the end of all.

    Args:
        requests: one for each call.
        find: a stream to start them on, another one each time; Unavailable where there is none.
        timeout_s: for all of them together.

    Attributes:
        choices_per_call: how much work each of them is.
    """

    def __init__(
        self, requests: Sequence[pb.GenerateRequest], find: Callable[[], "Session"], *, timeout_s: float
    ) -> None:
        self._requests = requests
        self._find = find
        self._session = find()
        self.choices_per_call = max(1, requests[0].sampling.n)
        self._max_waiting = _MAX_WAITING * len(requests) * self.choices_per_call
        self._open: dict[int, int] = {}  # number on the stream → number of the request
        self._arrived: list[tuple[int, Event]] = []
        self._error: SoftpromptError | None = None
        self._has_output = False
        self._is_paused = False
        self._notify: Callable[[], None] | None = None
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire)
        self._session.start(self, requests)

    @property
    def has_more(self) -> bool:
        """Whether there is something to take, if only the end or an error."""
        return bool(self._arrived) or not self._open

    @property
    def is_over(self) -> bool:
        """Whether all calls have ended well and all they said was taken."""
        return not self._open and not self._arrived and self._error is None

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify`, instead of any before, whenever there is something to take; it must not raise."""
        self._notify = notify

    async def wait(self) -> None:
        """Return once there is something to take."""
        arrived = asyncio.Event()
        self.follow(arrived.set)
        while not self.has_more:
            arrived.clear()
            await arrived.wait()

    def take(self) -> list[tuple[int, Event]]:
        """What arrived since the last look, with the numbers of the requests.

        Raises the error of the call that failed first, after what came before it.
        """
        if not self._arrived and self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        if self._is_paused:
            self._is_paused = False
            self._signal(pb.CALL_SIGNAL_RESUME)
        return arrived

    def cancel(self) -> None:
        """Abort what still runs; nothing happens if all have ended."""
        self._leave()
        self._deadline.cancel()

    def add(self, number: int, request: int) -> None:
        """Expect responses under this number on the stream."""
        self._open[number] = request

    def put(self, number: int, event: Event) -> None:
        """An event has come; `tell` of it when no more come with it."""
        self._has_output = self._has_output or not isinstance(event, pb.Accepted)
        self._arrived.append((self._open[number], event))

    def tell(self) -> None:
        """Let the reader take what has come; one that does not take enough is spared more."""
        if self._notify is not None:
            self._notify()
        if len(self._arrived) >= self._max_waiting and not self._is_paused:
            self._is_paused = True
            self._signal(pb.CALL_SIGNAL_PAUSE)

    def end(self, number: int, end: pb.CallEnd) -> None:
        """A call has ended; by an error the others end too."""
        del self._open[number]
        if end.reason:
            leaf = BY_REASON.get(end.reason, InternalError)
            self.fail(leaf(end.message, field=end.field, details=dict(end.details)))
        elif not self._open:
            self._deadline.cancel()

    def fail(self, error: SoftpromptError) -> None:
        """End all calls with this error, or start them elsewhere where that helps; `tell` of what has changed."""
        self._leave()
        if isinstance(error, Unavailable) and not self._has_output and self._restart():
            return
        self._error = self._error or error
        self._deadline.cancel()

    def _restart(self) -> bool:
        try:
            self._session = self._find()
        except Unavailable:
            return False
        self._session.start(self, self._requests)
        return True

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("the inference service did not answer in time"))
        self.tell()

    def _leave(self) -> None:
        self._signal(pb.CALL_SIGNAL_CANCEL)
        self._session.forget(self._open)
        self._open.clear()

    def _signal(self, signal: "pb.CallSignal.ValueType") -> None:
        for number in self._open:
            self._session.send(pb.GenerateManyRequest(call=number, signal=signal))


class Session:
    """One stream to the inference service. It lives until `finish` and the end of its calls, or it breaks.

    Attributes:
        load: how many choices run on it.
    """

    def __init__(self, stub: "pb_grpc.InferenceServiceAsyncStub") -> None:
        self._requests: asyncio.Queue[pb.GenerateManyRequest | None] = asyncio.Queue()
        self._calls: dict[int, Calls] = {}
        self._numbers = itertools.count(1)
        self._takes_calls_until_s = time.monotonic() + _MAX_AGE_S
        self._has_ended = False
        self._is_finishing = False
        self.load = 0
        self._stream = stub.GenerateMany(self._sent())
        self._ending = Ending(self._stream)
        # Nobody's own: it reads for all requests to come, not for the one that happened to be first.
        self.reading = asyncio.create_task(self._read(), context=contextvars.Context())

    @property
    def takes_calls(self) -> bool:
        """Whether calls may be started; if not, `finish` it and open another."""
        return not self._has_ended and time.monotonic() < self._takes_calls_until_s

    def start(self, calls: Calls, requests: Sequence[pb.GenerateRequest]) -> None:
        """Start a call for each request."""
        for position, request in enumerate(requests):
            number = next(self._numbers)
            self._calls[number] = calls
            self.load += calls.choices_per_call
            calls.add(number, position)
            self.send(pb.GenerateManyRequest(call=number, start=request))

    def send(self, request: pb.GenerateManyRequest) -> None:
        """Send a message; it is lost where the stream has ended, which its calls are told."""
        if not self._has_ended:
            self._requests.put_nowait(request)

    def forget(self, numbers: Iterable[int]) -> None:
        """Drop what still comes of these calls."""
        for number in numbers:
            if (calls := self._calls.pop(number, None)) is not None:
                self.load -= calls.choices_per_call
        self._end_if_idle()

    def finish(self) -> None:
        """Start no further calls; the stream ends with its last."""
        self._is_finishing = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        # Not before: what still runs may have to be paused or cancelled.
        if self._is_finishing and not self._calls:
            self._requests.put_nowait(None)

    async def close(self) -> None:
        """Abort all calls and end the stream."""
        self._stream.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)

    async def _sent(self) -> AsyncIterator[pb.GenerateManyRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        error: SoftpromptError = Unavailable("the inference service ended the stream; try again")
        try:
            async for message in self._stream:
                self._deliver(message)
        except grpc.aio.AioRpcError as failed:
            error = translate("inference", self._ending.of(failed))
        finally:
            self._has_ended = True
            for calls in set(self._calls.values()):
                calls.fail(error)
                calls.tell()

    def _deliver(self, message: pb.GenerateManyResponse) -> None:
        told: dict[Calls, None] = {}
        for number, delta in _deltas(message.deltas):
            # A cancelled call's may still be on their way.
            if (calls := self._calls.get(number)) is not None:
                calls.put(number, delta)
                told[calls] = None
        for event in message.events:
            if (calls := self._calls.get(event.call)) is not None:
                told[calls] = None
                if event.HasField("response"):
                    calls.put(event.call, _event(event.response))
                else:
                    self.forget((event.call,))
                    calls.end(event.call, event.end)
        for calls in told:
            calls.tell()


def _deltas(columns: pb.Deltas) -> Iterator[tuple[int, Delta]]:
    """Each delta with the number of its call."""
    token_ids, stop = list(columns.token_ids), 0
    rows = zip(columns.calls, columns.texts, columns.indexes, columns.num_tokens, strict=True)
    for number, text, index, num_tokens in rows:
        start, stop = stop, stop + num_tokens
        yield number, Delta(text, index, token_ids[start:stop])


def _event(response: pb.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "accepted":
            return response.accepted
        case "delta":
            delta = response.delta
            return Delta(delta.text, delta.index, delta.token_ids, delta.logprobs)
        case "finished":
            return response.finished
        case "prompt_logprobs":
            return response.prompt_logprobs
        case _:
            return response.usage
