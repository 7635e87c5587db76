"""The gateway's client, beside a server that answers what a test says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from softprompt.gateway import GatewayClient
from softprompt_api.errors import Unavailable


@contextmanager
def answering(body: bytes, content_type: str = "application/json") -> Iterator[str]:
    """The address of a server that answers everything with this."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


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
