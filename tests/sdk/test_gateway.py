"""The gateway's client, beside a server that answers what a test says."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from softprompt.gateway import GatewayClient
from softprompt_api.errors import Unavailable


@contextmanager
def answering(body: bytes, content_type: str = "application/json") -> Iterator[str]:
    """The address of a server that answers one request, whatever it is, with this."""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\nconnection: close\r\n\r\n".encode()

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request:
            lines = list(iter(request.readline, b"\r\n"))
            sizes = [line.split(b":")[1] for line in lines if line.lower().startswith(b"content-length:")]
            request.read(sum(map(int, sizes)))
            connection.sendall(head + body)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        answered = threads.submit(answer)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        answered.result()


@pytest.mark.parametrize("line_end", ["\u2028", "\u2029", "\x85"])
def test_what_others_take_for_the_end_of_a_line_stays_in_a_text(line_end: str) -> None:
    event = '{"choices": [{"text": "a' + line_end + 'b"}]}'
    stream = f"data: {event}\n\ndata: [DONE]\n\n".encode()
    with answering(stream, "text/event-stream") as url, GatewayClient(url) as client:
        assert list(client.complete("Hello", model="m")) == [f"a{line_end}b"]


@pytest.mark.parametrize(
    ("body", "ask", "message"),
    [
        (b"<html>", GatewayClient.models, "is no gateway"),
        (b"[]", GatewayClient.models, "is no gateway"),
        (b'{"data": [{"id": "a", "parent": "b"}]}', GatewayClient.base_model, "has no base model"),
    ],
)
def test_another_server_is_told_apart(body: bytes, ask: Callable[[GatewayClient], object], message: str) -> None:
    with answering(body) as url, GatewayClient(url) as client, pytest.raises(Unavailable, match=message):
        ask(client)
