"""Clients that leave, on real sockets: the inference service must see it."""

import asyncio
import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"


def _request(path: str, body: dict[str, Any], *, headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["stall", "silence"])
async def test_a_client_that_leaves_cancels_its_completion(stack: Any, prompt: str, stream: bool) -> None:
    body = {"model": stack.base, "prompt": prompt, "stream": stream}
    _, writer = await stack.connect(_request("/v1/completions", body))
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.close()
    await stack.inference.until(lambda fake: fake.cancelled == 1)
    assert stack.inference.running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("headers", "behind"),
    [("connection: upgrade, http2-settings\r\nupgrade: h2c\r\n", b""), ("", b"\r\n"), ("", b"GET / HTTP/1.1\r\n")],
)
async def test_a_client_that_leaves_is_noticed_behind_what_is_not_read_yet(
    stack: Any, headers: str, behind: bytes, stream: bool
) -> None:
    body = {"model": stack.base, "prompt": "stall", "stream": stream}
    request = _request("/v1/completions", body, headers=headers + "expect: 100-continue\r\n")
    head, end, content = request.partition(b"\r\n\r\n")
    reader, writer = await stack.connect(head + end)
    await reader.readuntil(b"\r\n\r\n")  # the body is waited for
    writer.write(content + behind)
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.close()
    await stack.inference.until(lambda fake: fake.cancelled == 1)


async def test_of_what_comes_behind_a_request_little_is_read(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "stall"}
    _, writer = await stack.connect(_request("/v1/completions", body))
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.transport.set_write_buffer_limits(0)
    writer.write(b"x" * 2**25)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.5)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_chat(stack: Any, stream: bool) -> None:
    body = {"model": stack.base, "messages": [{"role": "user", "content": "stall"}], "stream": stream}
    _, writer = await stack.connect(_request(CHAT, body))
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.transport.abort()
    await stack.inference.until(lambda fake: fake.cancelled == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["stall", "silence"])
async def test_a_client_that_leaves_cancels_its_response(stack: Any, text: str, stream: bool) -> None:
    body = {"model": stack.base, "input": text, "stream": stream}
    _, writer = await stack.connect(_request("/v1/responses", body))
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.transport.abort()
    await stack.inference.until(lambda fake: fake.cancelled == 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_all_prompts_of_a_leaving_client_are_cancelled(stack: Any, stream: bool) -> None:
    body = {"model": stack.base, "prompt": ["stall"] * 5, "stream": stream}
    _, writer = await stack.connect(_request("/v1/completions", body))
    await stack.inference.until(lambda fake: fake.running == 5)
    writer.close()
    await stack.inference.until(lambda fake: fake.cancelled == 5)


async def test_cancellation_is_seen_at_once(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "stall"}
    _, writer = await stack.connect(_request("/v1/completions", body))
    await stack.inference.until(lambda fake: fake.running == 1)
    writer.close()
    async with asyncio.timeout(1):
        await stack.inference.until(lambda fake: fake.cancelled == 1)


async def test_a_client_that_stops_reading_after_some_events_is_noticed(stack: Any) -> None:
    async with stack.http.stream("POST", CHAT, json=_chat(stack, "stall", stream=True)) as response:
        async for line in response.aiter_lines():
            if '"content":"s"' in line:
                break
    await stack.inference.until(lambda fake: fake.cancelled == 1)


@pytest.mark.parametrize("gateway_settings", [{"write_timeout_s": 0.3, "grace_s": 20}])
async def test_a_reader_that_never_reads_is_given_up(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "flood", "stream": True}
    reader, writer = await stack.connect(_request("/v1/completions", body))
    await reader.readuntil(b"data: ")
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await stack.inference.until(lambda fake: fake.cancelled == 1)
    writer.transport.abort()


async def test_others_go_on_when_one_leaves(stack: Any) -> None:
    _, leaver = await stack.connect(_request("/v1/completions", {"model": stack.base, "prompt": "stall"}))
    await stack.inference.until(lambda fake: fake.running == 1)
    staying = asyncio.create_task(stack.complete("hello"))
    leaver.close()
    assert (await staying).json()["choices"][0]["text"] == "hello"
    await stack.inference.until(lambda fake: fake.cancelled == 1)


async def test_a_client_that_leaves_while_sending_its_body_is_forgotten(stack: Any) -> None:
    whole = _request("/v1/completions", {"model": stack.base, "prompt": "stall"})
    _, writer = await stack.connect(whole[:-5])
    writer.close()
    assert (await stack.complete("hello")).status_code == 200
    assert len(stack.inference.requests) == 1


async def test_a_stopped_gateway_ends_running_requests_within_its_grace(running_stack: Any) -> None:
    async with asyncio.timeout(10):
        async with running_stack(grace_s=1) as stack:
            body = {"model": stack.base, "prompt": "stall", "stream": True}
            reader, _ = await stack.connect(_request("/v1/completions", body))
            await reader.readuntil(b"data: ")
        assert stack.inference.cancelled == 1


def _chat(stack: Any, content: str, **fields: Any) -> dict[str, Any]:
    return {"model": stack.base, "messages": [{"role": "user", "content": content}], **fields}
