import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.http_load import stream_all, stream_each, stream_one, stream_tokens
from benchmarks.workload import Request

REQUEST = Request(prompt_ids=[1, 2], num_tokens=2)


def event(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def choice(text: str, ids: list[int]) -> bytes:
    return event({"choices": [{"text": text, "token_ids": ids}]})


USAGE = event({"choices": [], "usage": {"completion_tokens": 2}})
DONE = event(b"[DONE]")
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that gives everybody this answer; its port."""
    loop = asyncio.new_event_loop()
    ports: list[int] = []
    ready = threading.Event()
    done = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


def test_a_chunked_stream_is_read_to_its_end() -> None:
    body = chunked(choice("", []), choice("a", [7]), choice("b", [8]) + USAGE, DONE)
    with answering(OK + b"Transfer-Encoding: chunked\r\n\r\n" + body) as port:
        stream = stream_one(port, "model", REQUEST)
    assert stream.token_ids == [7, 8]
    assert stream.num_tokens == 2
    assert stream.first_token_at > stream.began_at > 0


def test_many_streams_are_read_at_once() -> None:
    with answering(OK + b"\r\n" + choice("a", [7]) + choice("b", [8]) + USAGE + DONE) as port:
        streams = stream_all(port, "model", [REQUEST] * 3)
    assert [stream.num_tokens for stream in streams] == [2, 2, 2]


def test_each_stream_has_a_model_of_its_own_and_few_run_at_once() -> None:
    with answering(OK + b"\r\n" + choice("a", [7]) + USAGE + DONE) as port:
        streams = stream_each(port, [(f"model{number}", REQUEST) for number in range(5)], at_once=2)
    assert [stream.num_tokens for stream in streams] == [2] * 5


def test_the_times_of_tokens_rise() -> None:
    with answering(OK + b"\r\n" + choice("a", [7]) + USAGE + DONE) as port:
        times = stream_tokens(port, "model", [REQUEST] * 2)
    assert [len(seen) for seen in times] == [1, 1]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 Unavailable\r\n\r\nlater", "503"),
        (OK + b"\r\n" + choice("a", [7]), "ended early"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(choice("a", [7]))[:-5], "ended early"),
    ],
)
def test_what_is_no_whole_stream_is_an_error(answer: bytes, why: str) -> None:
    with answering(answer) as port, pytest.raises(ValueError, match=why):
        stream_one(port, "model", REQUEST)
