"""All requests of a gateway on one stream to the inference service, each with its own fate."""

import asyncio
import json
from typing import Any

import pytest
from softprompt_gateway import session as session_module


async def test_requests_share_a_stream(stack: Any) -> None:
    texts = [f"text {number}" for number in range(20)]
    answers = await asyncio.gather(*[stack.complete(text) for text in texts])
    assert [answer.json()["choices"][0]["text"] for answer in answers] == texts
    assert stack.inference.sessions == 1


async def test_an_old_stream_takes_no_further_requests_and_lets_its_own_end(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_MAX_AGE_S", 0.0)
    waiting = asyncio.create_task(stack.complete("wait"))
    await stack.inference.until(lambda fake: fake.running == 1)
    assert (await stack.complete("hello")).status_code == 200
    assert (await stack.complete("hello")).status_code == 200
    assert stack.inference.sessions == 3
    stack.inference.released.set()
    assert (await waiting).json()["choices"][0]["text"] == "wwait"
    await stack.inference.until(lambda fake: fake.open_sessions == 1)


async def test_a_broken_stream_fails_its_requests_and_the_next_one_opens_another(stack: Any) -> None:
    reader, _ = await stack.connect(_request({"model": stack.base, "prompt": "stall", "stream": True}))
    await reader.readuntil(b"data: ")  # gRPC tries a stream again that has not been answered
    await stack.restart_inference()
    assert b'"code":"unavailable"' in await reader.readuntil(b"0\r\n\r\n")
    async with asyncio.timeout(5):
        while (await stack.complete("hello")).status_code != 200:  # until gRPC has connected again
            pass
    assert stack.inference.open_sessions == 1


async def test_an_unread_stream_pauses_its_call_and_no_other(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MAX_WAITING", 4)
    body = {"model": stack.base, "prompt": "flood", "stream": True}
    reader, writer = await stack.connect(_request(body))
    await reader.readuntil(b"data: ")
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await stack.inference.until(lambda fake: fake.pauses >= 1)
    assert (await stack.complete("hello")).json()["choices"][0]["text"] == "hello"
    writer.transport.abort()
    await stack.inference.until(lambda fake: fake.cancelled == 1)


@pytest.mark.parametrize("gateway_settings", [{"request_timeout_s": 0.2}])
async def test_a_deadline_ends_all_calls_of_a_request(stack: Any) -> None:
    answer = await stack.complete(["stall", "stall"])
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await stack.inference.until(lambda fake: fake.cancelled == 2)


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
