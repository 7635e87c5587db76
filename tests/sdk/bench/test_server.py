"""What is timed of a stream, on a clock that goes on by a second with every look at it."""

import itertools
from collections.abc import AsyncIterator

import httpx
import pytest
from softprompt.bench import server as server_module
from softprompt.bench.server import Server
from softprompt.bench.workload import Request

EVENTS = [
    'data:{"choices": [{"text": "a"}]}',
    'data: {"choices": [{"text": "b"}]}',
    'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
    "data: [DONE]",
]


async def sent() -> AsyncIterator[bytes]:
    for event in EVENTS:
        yield f"{event}\n\n".encode()


async def test_a_completion_takes_until_its_last_token_with_or_without_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(1.0)
    monkeypatch.setattr(server_module.time, "perf_counter", lambda: next(clock))
    server = Server("http://server")
    server._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, content=sent())))
    outcome = await server.complete(Request(model="m", prompt="x", output_len=2, send_at_s=0.0), 0.0)
    assert outcome.error == ""
    first_s, last_s = outcome.event_s
    assert (outcome.ttft_s, outcome.end_s, outcome.tpot_s) == (first_s, last_s, last_s - first_s)
    assert (outcome.input_tokens, outcome.output_tokens) == (3, 2)


async def test_events_are_asked_for_as_they_are() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["accept-encoding"])
        return httpx.Response(200, content=sent())

    server = Server("http://server")
    server._http._transport = httpx.MockTransport(answer)
    async with server:
        outcome = await server.complete(Request(model="m", prompt="x", output_len=2, send_at_s=0.0), 0.0)
    assert (outcome.error, asked) == ("", ["identity"])
