"""The bytes of streams, and how streams end."""

import asyncio
import json
from typing import Any

import openai
import pytest
from softprompt_gateway import sse
from softprompt_gateway.connection import Connection


def test_an_event_is_one_data_line() -> None:
    assert sse.event(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert sse.DONE == b"data: [DONE]\n\n"


async def test_the_bytes_of_a_stream_are_events_and_nothing_else(stack: Any) -> None:
    await stack.events("/v1/completions", model=stack.base, prompt="a\n\u2028é", max_tokens=9)
    blocks = stack.raw_bodies[-1].split(b"\n\n")
    assert blocks[-2:] == [b"data: [DONE]", b""]
    for block in blocks[:-2]:
        assert block.startswith(b'data: {"id":"cmpl-')
        assert b"\n" not in block
        event = json.loads(block.removeprefix(b"data: "))
        assert list(event) == ["id", "object", "created", "model", "choices"]


async def test_a_stream_is_not_to_be_buffered(stack: Any) -> None:
    response = await stack.complete("x", stream=True)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("refuse OVERLOADED", 503, "overloaded"),
        ("refuse CONTEXT_LENGTH_EXCEEDED", 400, "context_length_exceeded"),
        ("crash", 500, "internal_error"),
    ],
)
async def test_a_failure_before_the_first_byte_has_its_own_status(
    stack: Any, prompt: str, status: int, code: str
) -> None:
    response = await stack.complete(prompt, stream=True)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "passwd" not in response.text


async def test_a_failure_after_the_first_byte_is_the_streams_last_event(stack: Any) -> None:
    events = await stack.events("/v1/completions", model=stack.base, prompt="break UNAVAILABLE")
    assert events[0]["choices"][0]["text"] == "b"
    assert events[1:] == [
        {"error": {"message": "broken as asked", "type": "server_error", "param": None, "code": "unavailable"}}
    ]


async def test_openais_client_raises_the_error_of_a_broken_stream(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=stack.base, messages=[{"role": "user", "content": "break UNAVAILABLE"}], stream=True
    )
    with pytest.raises(openai.APIError, match="broken as asked"):
        async for _ in stream:
            pass


async def test_one_breaking_prompt_ends_the_stream_of_all(stack: Any) -> None:
    prompts = ["stall", "stall", "break DEADLINE_EXCEEDED"]
    events = await stack.events("/v1/completions", model=stack.base, prompt=prompts)
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert {event["choices"][0]["text"] for event in events[:-1]} <= {"b", "s"}
    await stack.inference.until(lambda fake: fake.running == 0)


@pytest.mark.parametrize("prompts", [["hello"], ["hello", "there", "you all"]])
async def test_streamed_text_is_the_unstreamed_text(stack: Any, prompts: list[str]) -> None:
    whole = [choice["text"] for choice in (await stack.complete(prompts, n=2)).json()["choices"]]
    texts = [""] * len(whole)
    events = await stack.events("/v1/completions", model=stack.base, prompt=prompts, n=2)
    for event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == whole


async def test_a_client_of_http_1_0_reads_events_without_chunks_until_the_end(stack: Any) -> None:
    content = json.dumps({"model": stack.base, "prompt": "hello", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    reader, _ = await stack.connect(head + content)
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert b"transfer-encoding" not in answer.lower()
    blocks = answer.partition(b"\r\n\r\n")[2].split(b"\n\n")
    texts = [json.loads(block.removeprefix(b"data: "))["choices"][0]["text"] for block in blocks[:-2]]
    assert "".join(texts) == "hello"
    assert blocks[-2:] == [b"data: [DONE]", b""]


async def test_two_streams_asked_for_at_once_on_one_connection_come_one_after_the_other(stack: Any) -> None:
    content = json.dumps({"model": stack.base, "prompt": "hello", "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n%bcontent-length: %d\r\n\r\n%b"
    requests = [request % (extra, len(content), content) for extra in (b"", b"connection: close\r\n")]
    reader, _ = await stack.connect(b"".join(requests))
    async with asyncio.timeout(5):
        answer = await reader.read()
    first, second = answer.split(b"HTTP/1.1 200")[1:]
    for one in (first, second):
        assert one.endswith(b"\n\n\r\n0\r\n\r\n")
        assert one.count(b"data: [DONE]") == 1


class _One:
    """One event."""

    has_more = True
    has_ended = False

    def follow(self, notify: Any) -> None:
        self.notify = notify

    def take(self) -> bytes:
        assert not self.has_ended
        self.has_more, self.has_ended = False, True
        return b"x"

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_stream_has_not_ended_before_its_last_event_is_read_or_given_up(is_read: bool) -> None:
    written: list[bytes] = []

    def write(data: bytes) -> None:
        written.append(data)
        connection.pause()

    connection = Connection(write, write_timeout_s=60)
    writing = sse._Writing(_One(), connection)
    assert written == [b"x"]
    assert not writing.ended.done()
    (connection.resume if is_read else connection.lose)()
    assert await writing.ended is None
    assert written == [b"x"]
