"""Streams of /v1/completions, read by as little code as can be: what the client costs, the server lacks."""

import contextlib
import itertools
import json
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from benchmarks.workload import Request

_TIMEOUT_S = 600.0
_PIECE_BYTES = 1 << 14
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
    answers = [_Answer(_http(port, model, request, with_ids)) for request in requests]
    return _read(port, answers, at_once=len(answers))


def stream_each(port: int, requests: Sequence[tuple[str, Request]], *, at_once: int) -> list[Stream]:
    """Each request to a model of its own, at most so many at a time. Errors as in `stream_one`."""
    return _read(port, [_Answer(_http(port, *each, False)) for each in requests], at_once=at_once)


def stream_tokens(port: int, model: str, requests: Sequence[Request]) -> list[list[float]]:
    """When the tokens of each stream came, by time.monotonic(); all run at once. Errors as in `stream_one`."""
    answers = [_Answer(_http(port, model, request, True), times=[]) for request in requests]
    _read(port, answers, at_once=len(answers))
    return [answer.times or [] for answer in answers]


@dataclass(slots=True)
class _Answer:
    """What comes for a request.

    Attributes:
        times: of each piece that has a token in it; None: not wanted.
    """

    request: bytes
    times: list[float] | None = None
    pieces: list[bytes] = field(default_factory=list)
    began_at: float = 0.0
    first_token_at: float = 0.0

    def connect(self, port: int) -> socket.socket:
        """Send the request."""
        self.began_at = time.monotonic()
        connection = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        try:
            connection.sendall(self.request)
        except OSError:
            connection.close()
            raise
        return connection

    def take(self, data: bytes) -> None:
        """The next piece."""
        self.pieces.append(data)
        if self.times is not None and _TOKEN.search(data):
            self.times.append(time.monotonic())
        if not self.first_token_at and _TOKEN.search(b"".join(self.pieces)):
            self.first_token_at = time.monotonic()


def _read(port: int, answers: Sequence[_Answer], *, at_once: int) -> list[Stream]:
    """By sockets and a selector, which cost less for a token than asyncio."""
    deadline, waiting = time.monotonic() + _TIMEOUT_S, iter(answers)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:

        def begin(answer: _Answer) -> None:
            connection = connections.enter_context(answer.connect(port))
            selector.register(connection, selectors.EVENT_READ, answer)

        for answer in itertools.islice(waiting, at_once):
            begin(answer)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"streams had not ended after {_TIMEOUT_S:.0f} s")
            for key, _ in ready:
                connection = cast(socket.socket, key.fileobj)
                if data := connection.recv(_PIECE_BYTES):
                    key.data.take(data)
                    continue
                selector.unregister(connection)
                connection.close()
                for answer in itertools.islice(waiting, 1):
                    begin(answer)
    return [_parse(b"".join(answer.pieces), answer.began_at, answer.first_token_at) for answer in answers]


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
