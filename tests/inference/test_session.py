"""Many generations on one stream: in order, together where they come together, and each with an end of its own."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument, Overloaded
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_inference import session as session_module
from softprompt_inference.choice import Delta
from softprompt_inference.session import Session


class Generation:
    """Says what a test tells it to: a text, an error, or None for its end."""

    def __init__(self) -> None:
        self.said: deque[Any] = deque()
        self.has_ended = False
        self._notify: Callable[[], None] = lambda: None

    @property
    def has_more(self) -> bool:
        return bool(self.said)

    def follow(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        notify()

    def say(self, *said: Any) -> None:
        self.said += said
        self._notify()

    def take(self) -> list[Delta]:
        if not self.said:
            return []
        said = self.said.popleft()
        if isinstance(said, Exception):
            raise said
        self.has_ended = said is None
        return [] if said is None else [Delta(index=0, text=said, token_ids=[], logprobs=[])]


@dataclass
class Generations:
    """Generations; a request's text is its name."""

    running: dict[str, Generation] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    started: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    @asynccontextmanager
    async def start(self, request: pb.GenerateRequest) -> AsyncIterator[Generation]:
        self.running[request.text] = generation = Generation()
        self.started.put_nowait(request.text)
        try:
            yield generation
        finally:
            self.closed.append(request.text)


def write(said: Delta, response: pb.GenerateResponse) -> None:
    response.delta.text = said.text


@dataclass
class World:
    """A session with its client's end."""

    generations: Generations
    session: Session[Delta]
    requests: asyncio.Queue[pb.GenerateManyRequest | None]
    messages: AsyncGenerator[pb.GenerateManyResponse, None]

    async def start(self, number: int, name: str) -> None:
        self.requests.put_nowait(pb.GenerateManyRequest(call=number, start=pb.GenerateRequest(text=name)))
        assert await self.generations.started.get() == name

    def signal(self, number: int, signal: Any) -> None:
        self.requests.put_nowait(pb.GenerateManyRequest(call=number, signal=signal))

    def say(self, name: str, *said: Any) -> None:
        self.generations.running[name].say(*said)

    async def next(self) -> list[tuple[int, str]]:
        """The next message: call and text, or call and "end REASON"."""
        message = await anext(self.messages)
        return [
            *zip(message.deltas.calls, message.deltas.texts, strict=True),
            *(
                (
                    event.call,
                    event.response.delta.text if event.HasField("response") else f"end {event.end.reason}",
                )
                for event in message.events
            ),
        ]

    async def settle(self) -> None:
        """Let every task run until it waits."""
        for _ in range(50):
            await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    requests: asyncio.Queue[pb.GenerateManyRequest | None] = asyncio.Queue()

    async def sent() -> AsyncIterator[pb.GenerateManyRequest]:
        while (request := await requests.get()) is not None:
            yield request

    generations = Generations()
    session = Session(generations.start, write)
    async with aclosing(session.serve(sent())) as messages:
        first = asyncio.ensure_future(anext(messages))  # it serves from its first look on
        await asyncio.sleep(0)
        yield World(generations, session, requests, _after(first, messages))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def _after(
    first: asyncio.Future[pb.GenerateManyResponse], messages: AsyncGenerator[pb.GenerateManyResponse, None]
) -> AsyncGenerator[pb.GenerateManyResponse, None]:
    try:
        yield await first
    except StopAsyncIteration:
        return
    async for message in messages:
        yield message


async def test_what_is_said_in_one_turn_travels_in_one_message(world: World) -> None:
    for number, name in ((1, "a"), (2, "b"), (3, "c")):
        await world.start(number, name)
    world.say("b", "x")
    world.say("a", "y", "z")
    world.say("c", "w")
    events = await world.next()
    assert sorted(events) == [(1, "y"), (1, "z"), (2, "x"), (3, "w")]
    assert [text for call, text in events if call == 1] == ["y", "z"]


async def test_a_generation_ends_with_its_end_and_the_others_go_on(world: World) -> None:
    await world.start(1, "a")
    await world.start(2, "b")
    world.say("a", "last", None)
    assert await world.next() == [(1, "last"), (1, "end ")]
    world.say("b", "more")
    assert await world.next() == [(2, "more")]


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (Overloaded("too many"), "OVERLOADED", "too many"),
        (RuntimeError("secret in /etc/passwd"), "INTERNAL", "internal error; the service's log has the details"),
    ],
)
async def test_a_failure_is_told_as_the_calls_own(
    world: World, error: Exception, reason: str, message: str
) -> None:
    await world.start(1, "a")
    world.say("a", error)
    [event] = (await anext(world.messages)).events
    assert (event.end.reason, event.end.message) == (reason, message)


async def test_the_field_and_the_facts_of_an_error_are_told(world: World) -> None:
    await world.start(1, "a")
    world.say("a", InvalidArgument("too high", field="top_p", details={"limit": "1"}))
    [event] = (await anext(world.messages)).events
    assert (event.end.field, dict(event.end.details)) == ("top_p", {"limit": "1"})


async def test_a_cancelled_generation_is_closed_and_says_nothing_more(world: World) -> None:
    await world.start(1, "a")
    await world.start(2, "b")
    world.signal(1, pb.CALL_SIGNAL_CANCEL)
    await world.settle()
    assert world.generations.closed == ["a"]
    world.say("a", "unheard")
    world.say("b", "heard")
    assert await world.next() == [(2, "heard")]


async def test_signals_for_calls_that_have_ended_are_ignored(world: World) -> None:
    for signal in (pb.CALL_SIGNAL_CANCEL, pb.CALL_SIGNAL_PAUSE, pb.CALL_SIGNAL_RESUME):
        world.signal(9, signal)
    await world.start(1, "a")
    world.say("a", "x")
    assert await world.next() == [(1, "x")]


async def test_nothing_is_taken_from_a_paused_generation_until_it_is_resumed(world: World) -> None:
    await world.start(1, "a")
    await world.start(2, "b")
    world.say("a", "one")
    assert await world.next() == [(1, "one")]
    world.signal(1, pb.CALL_SIGNAL_PAUSE)
    await world.settle()
    world.say("a", "two", "three")
    world.say("b", "heard")
    assert await world.next() == [(2, "heard")]
    assert len(world.generations.running["a"].said) == 2
    world.signal(1, pb.CALL_SIGNAL_RESUME)
    assert await world.next() == [(1, "two"), (1, "three")]


async def test_a_generation_that_is_paused_before_it_began_says_all_when_it_is_resumed(world: World) -> None:
    world.requests.put_nowait(pb.GenerateManyRequest(call=1, start=pb.GenerateRequest(text="a")))
    world.signal(1, pb.CALL_SIGNAL_PAUSE)
    await world.settle()
    world.say("a", "one", None)
    world.signal(1, pb.CALL_SIGNAL_RESUME)
    assert await world.next() == [(1, "one"), (1, "end ")]


async def test_a_paused_generation_can_be_cancelled(world: World) -> None:
    await world.start(1, "a")
    world.signal(1, pb.CALL_SIGNAL_PAUSE)
    await world.settle()
    world.say("a", "one")
    world.signal(1, pb.CALL_SIGNAL_CANCEL)
    await world.settle()
    assert world.generations.closed == ["a"]


async def test_what_is_not_taken_stays_with_the_generations(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_FULL_BYTES", 1000)
    await world.start(1, "a")
    await world.start(2, "b")
    for name in ("a", "b"):
        world.say(name, *("x" * 400 for _ in range(5)))
    await world.settle()
    # One batch is on its way and one is full; nobody takes it, so everybody waits.
    assert sum(len(generation.said) for generation in world.generations.running.values()) >= 4
    texts: list[tuple[int, str]] = []
    while len(texts) < 10:
        texts += (message := await world.next())
        assert len(message) <= 3
    assert sorted(call for call, _ in texts) == [1] * 5 + [2] * 5


async def test_half_closing_ends_the_stream_after_the_last_generation(world: World) -> None:
    await world.start(1, "a")
    world.requests.put_nowait(None)
    world.say("a", "x")
    assert await world.next() == [(1, "x")]
    world.say("a", None)
    assert await world.next() == [(1, "end ")]
    with pytest.raises(StopAsyncIteration):
        await anext(world.messages)


async def test_a_closed_session_refuses_further_generations_and_ends_after_the_last(world: World) -> None:
    await world.start(1, "a")
    world.session.close()
    world.requests.put_nowait(pb.GenerateManyRequest(call=2, start=pb.GenerateRequest(text="b")))
    assert await world.next() == [(2, "end UNAVAILABLE")]
    world.say("a", None)
    assert await world.next() == [(1, "end ")]
    with pytest.raises(StopAsyncIteration):
        await anext(world.messages)


async def test_an_idle_session_ends_when_it_is_closed(world: World) -> None:
    world.session.close()
    with pytest.raises(StopAsyncIteration):
        await anext(world.messages)


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateManyRequest(call=1, start=pb.GenerateRequest(text="again")),
        pb.GenerateManyRequest(call=2),
    ],
)
async def test_a_message_without_sense_breaks_the_stream_and_aborts_all(
    world: World, request_: pb.GenerateManyRequest
) -> None:
    await world.start(1, "a")
    world.requests.put_nowait(request_)
    with pytest.raises(InvalidArgument):
        await anext(world.messages)
    assert world.generations.closed == ["a"]


async def test_a_broken_stream_aborts_all(world: World) -> None:
    await world.start(1, "a")
    await world.start(2, "b")
    world.say("a", "x")
    await world.next()
    reading = asyncio.ensure_future(anext(world.messages))
    await world.settle()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert sorted(world.generations.closed) == ["a", "b"]


async def test_a_generation_that_is_cancelled_before_it_has_begun_leaves_nothing(world: World) -> None:
    world.requests.put_nowait(pb.GenerateManyRequest(call=1, start=pb.GenerateRequest(text="a")))
    world.signal(1, pb.CALL_SIGNAL_CANCEL)
    await world.settle()
    assert world.generations.started.empty()
    await world.start(1, "b")  # the number is free again
    world.say("b", "x", None)
    assert await world.next() == [(1, "x"), (1, "end ")]
    world.requests.put_nowait(None)
    async with asyncio.timeout(10):
        with pytest.raises(StopAsyncIteration):
            await world.next()
