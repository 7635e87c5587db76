"""HTTP itself, on bare sockets: headers that are late, huge or malformed."""

import asyncio
import socket
from typing import Any

import pytest
from softprompt_gateway.server import limit_unread, listen


async def _answer(stack: Any, request: bytes) -> bytes:
    reader, writer = await stack.connect(request)
    async with asyncio.timeout(5):
        answer: bytes = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("gateway_settings", [{"header_timeout_s": 0.2}])
@pytest.mark.parametrize("sent", [b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: "])
async def test_headers_that_do_not_come_are_not_waited_for(stack: Any, sent: bytes) -> None:
    answer = await _answer(stack, sent)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in answer


@pytest.mark.parametrize("gateway_settings", [{"header_timeout_s": 0.2}])
async def test_the_next_request_of_a_connection_has_the_same_deadline(stack: Any) -> None:
    reader, writer = await stack.connect(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b'"ok"}')
    writer.write(b"GET /health/li")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


@pytest.mark.parametrize("gateway_settings", [{"header_timeout_s": 0.2, "require_keys": True}])
async def test_a_connection_is_idle_when_the_body_of_an_answered_request_has_come(stack: Any) -> None:
    reader, writer = await stack.connect(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n")
    await reader.readuntil(b'"invalid_api_key"}}')
    writer.write(b"body")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.5)
    writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b'"ok"}')
    writer.close()


@pytest.mark.parametrize("gateway_settings", [{"header_timeout_s": 0.2}])
async def test_a_request_may_take_longer_than_its_headers(stack: Any) -> None:
    reader, writer = await stack.connect(
        b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-length: 50\r\n\r\n"
    )
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.5)
    writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 2**20 + b"\r\n\r\n", id="1 MB header"),
        pytest.param(
            b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000 + b"connection: close\r\n\r\n",
            id="10,000 headers",
        ),
        pytest.param(b"nonsense\r\n\r\n", id="not HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", id="two hosts"),
        pytest.param(
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", id="two lengths"
        ),
        pytest.param(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", id="negative length"),
        pytest.param(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", id="odd transfer encoding"),
    ],
)
async def test_malformed_http_is_refused_in_our_shape(stack: Any, request_: bytes) -> None:
    answer = await _answer(stack, request_)
    assert answer.startswith(b"HTTP/1.1 4")
    assert b'"error"' in answer
    assert (await stack.http.get("/health/live")).status_code == 200


async def test_a_bad_body_ends_the_request_that_waits_for_it(stack: Any, logged: list[Any]) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ntransfer-encoding: chunked\r\n\r\n"
    assert (await _answer(stack, head + b"zz\r\n")).startswith(b"HTTP/1.1 400")
    while stack.gateway.admission.num_running:
        await stack.http.get("/health/live")
    assert [event["status"] for event in logged if event["event"] == "request"] == [499]


async def test_a_refused_client_that_goes_on_for_ever_is_cut_off(stack: Any) -> None:
    reader, writer = await stack.connect(b"nonsense\r\n\r\n")
    await reader.readuntil(b'"invalid_http"}}')

    async def go_on() -> None:
        while True:
            writer.write(b"x" * 2**20)
            await writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(go_on(), 20)


@pytest.mark.parametrize("host", ["a/health?x=", "evil.example", "127.0.0.1:1", "[::1]"])
async def test_the_host_header_decides_nothing(stack: Any, host: str) -> None:
    answer = await _answer(
        stack, f"GET /v1/nothing HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 404")
    assert host.encode() not in answer


async def test_content_length_with_chunks_is_one_request(stack: Any) -> None:
    smuggled = (
        b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\nconnection: close\r\ncontent-length: 6\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    )
    answer = await _answer(stack, smuggled)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400")


async def test_a_taken_port_is_told_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


async def test_a_host_that_is_none_is_told_in_words() -> None:
    with pytest.raises(OSError, match="cannot listen on"):
        listen("no such host", 0)


async def test_an_answer_does_not_wait_until_the_one_before_is_acknowledged(stack: Any) -> None:
    await stack.http.get("/health/live")
    (connection,) = stack.gateway.server.server_state.connections
    client = connection.transport.get_extra_info("socket")
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class _Writer(asyncio.Protocol):
    """Writes more than fits any buffer, closes, and tells when the connection has really ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        limit_unread(transport, 0.3)
        transport.write(b"x" * 20_000_000)
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def test_a_closed_connection_that_nobody_reads_ends() -> None:
    writer = _Writer()
    async with await asyncio.get_running_loop().create_server(lambda: writer, "127.0.0.1", 0) as server:
        with socket.create_connection(server.sockets[0].getsockname()):
            async with asyncio.timeout(10):
                await writer.ended.wait()
