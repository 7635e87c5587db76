"""Streams of /v1/completions, read by as little code as can be: what the client costs, the server lacks."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.workload import Request

_TIMEOUT_S = 600.0
_EVENT = b"data: "
# An event before the first token has an empty text and no ids.
_TOKEN = re.compile(rb'"text": ?"[^"]|"token_ids": ?\[[0-9]')
# The events of which more is read.
_TOLD = re.compile(rb'"usage": ?\{|"token_ids": ?\[[0-9]')


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One streamed answer.

    Attributes:
        began_at: time.monotonic() before it was connected.
        first_token_at: when its first token came.
        num_tokens: as its usage says.
        token_ids: of the choice, where they were asked for.
    """

    began_at: float
    first_token_at: float
    num_tokens: int
    token_ids: list[int]


def stream_one(port: int, model: str, request: Request) -> Stream:
    """One request, with its ids. OSError where nobody listens, ValueError where no stream of tokens comes."""
    return stream_all(port, model, [request], with_ids=True)[0]


def stream_all(port: int, model: str, requests: Sequence[Request], *, with_ids: bool = False) -> list[Stream]:
    """All requests at once, each on a connection of its own. Errors as in `stream_one`."""

    async def gather() -> list[Stream]:
        async with asyncio.timeout(_TIMEOUT_S):
            return await asyncio.gather(
                *(_stream(port, _http(port, model, request, with_ids)) for request in requests)
            )

    return asyncio.run(gather())


def stream_each(port: int, requests: Sequence[tuple[str, Request]], *, at_once: int) -> list[Stream]:
    """Each request to a model of its own, at most so many at a time. Errors as in `stream_one`."""

    async def gather() -> list[Stream]:
        places = asyncio.Semaphore(at_once)

        async def stream(model: str, request: Request) -> Stream:
            async with places:
                return await _stream(port, _http(port, model, request, False))

        async with asyncio.timeout(_TIMEOUT_S):
            return await asyncio.gather(*(stream(model, request) for model, request in requests))

    return asyncio.run(gather())


def stream_tokens(port: int, model: str, requests: Sequence[Request]) -> list[list[float]]:
    """When the tokens of each stream came, by time.monotonic(); all run at once. Errors as in `stream_one`."""

    async def gather() -> list[list[float]]:
        times: list[list[float]] = [[] for _ in requests]
        async with asyncio.timeout(_TIMEOUT_S):
            await asyncio.gather(
                *(
                    _stream(port, _http(port, model, request, True), seen)
                    for request, seen in zip(requests, times, strict=True)
                )
            )
        return times

    return asyncio.run(gather())


async def _stream(port: int, request: bytes, seen: list[float] | None = None) -> Stream:
    """One answer; `seen` gets the time of each piece that has a token in it."""
    loop, began_at = asyncio.get_running_loop(), time.monotonic()
    transport, answer = await loop.create_connection(lambda: _Answer(request, seen), "127.0.0.1", port)
    try:
        await answer.ended
    finally:
        transport.close()
    return _parse(b"".join(answer.pieces), began_at, answer.first_token_at)


class _Answer(asyncio.Protocol):
    """Keeps what comes; no task wakes for it.

    Attributes:
        ended: done when all has come, or the connection has failed.
    """

    def __init__(self, request: bytes, seen: list[float] | None) -> None:
        self._request = request
        self._seen = seen
        self.pieces: list[bytes] = []
        self.first_token_at = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)
        if self._seen is not None and _TOKEN.search(data):
            self._seen.append(time.monotonic())
        if not self.first_token_at and _TOKEN.search(b"".join(self.pieces)):
            self.first_token_at = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)


def _http(port: int, model: str, request: Request, with_ids: bool) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "prompt": request.prompt_ids,
            "max_tokens": request.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": with_ids,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _parse(data: bytes, began_at: float, first_at: float) -> Stream:
    head, _, body = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ValueError(f"the gateway answered {head[:80]!r} {body[:300]!r}")
    if b"transfer-encoding: chunked" in head.lower():
        body = _dechunk(body)
    events = [line[len(_EVENT) :] for line in body.split(b"\n") if line.startswith(_EVENT)]
    if not events or events[-1].strip() != b"[DONE]":
        raise ValueError(f"the stream ended early: {body[-300:]!r}")
    token_ids: list[int] = []
    num_tokens = -1
    for event in filter(_TOLD.search, events[:-1]):
        message = json.loads(event)
        for choice in message["choices"]:
            token_ids += choice.get("token_ids") or []
        if usage := message.get("usage"):
            num_tokens = usage["completion_tokens"]
    return Stream(began_at=began_at, first_token_at=first_at, num_tokens=num_tokens, token_ids=token_ids)


def _dechunk(body: bytes) -> bytes:
    """The content of a chunked body; ValueError where it is cut."""
    content = b""
    while True:
        size_text, found, rest = body.partition(b"\r\n")
        if not found:
            raise ValueError("the body ended early")
        size = int(size_text.split(b";")[0], 16)
        if size == 0:
            return content
        content += rest[:size]
        body = rest[size + 2 :]
