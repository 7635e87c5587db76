"""uvicorn with h11, hardened: deadlines for headers, errors in our shape, and an orderly stop."""

import asyncio
import contextlib
import math
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import h11
import structlog
import uvicorn
from softprompt_api.rpc.tls import ServerTls
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from softprompt_gateway.admission import Admission
from softprompt_gateway.connection import Connection
from softprompt_gateway.errors import Refused
from softprompt_gateway.settings import Settings

_MAX_HEADER_BYTES = 64 * 2**10
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
# How long, and how much, a refused client may go on sending before it must have read why.
_LINGER_S = 2.0
_LINGER_BYTES = 16 * 2**20
# How long those that the grace was too short for have to be told, and to read it.
_FLUSH_S = 2.0
_log = structlog.get_logger()


def protocol_with_deadlines(header_timeout_s: float, write_timeout_s: float) -> type[H11Protocol]:
    """An HTTP protocol that gives up connections whose headers do not arrive or whose answers are not read."""

    class DeadlineProtocol(H11Protocol):
        """Times the wait for headers; after them the app's own deadlines hold. Its requests have a Connection."""

        _deadline: asyncio.TimerHandle | None = None
        _client: Connection | None = None
        _is_refused = False
        _num_discarded = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._answer, self.app = self.app, self._run
            send_at_once(transport)
            limit_unread(transport, write_timeout_s)
            self._arm()

        def data_received(self, data: bytes) -> None:
            if self._is_refused:
                self._discard(data)
                return
            super().data_received(data)
            if self._is_refused:
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm()
            elif self.cycle is None or self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
                self._arm()
            else:  # the rest of a request that was answered before it had come: the connection is idle again
                self._disarm()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def handle_events(self) -> None:
            super().handle_events()
            # uvicorn reads nothing while bytes wait behind a request: then nobody would see its client leave.
            cycle = self.cycle
            if cycle is None or cycle.more_body or cycle.response_complete or not self.flow.read_paused:
                return
            if len(self.conn.trailing_data[0]) < _MAX_HEADER_BYTES:
                self.flow.resume_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self.app = self._answer  # nothing is left that refers to itself
            super().connection_lost(exc)
            if self._client is not None:
                self._client.lose()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._client is not None:
                self._client.pause()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._client is not None:
                self._client.resume()

        def send_400_response(self, msg: str) -> None:
            self._refuse(Refused(msg, code="invalid_http"), http_status=400)

        async def _run(self, scope: Any, receive: Any, send: Any) -> None:
            client = self._client = Connection(self._write, write_timeout_s=write_timeout_s)
            client.attach(scope)
            if self.flow.write_paused:  # by the answer before
                client.pause()
            if self.cycle.disconnected:
                client.lose()
            try:
                await self._answer(scope, receive, send)
            finally:
                if self._client is client:  # the next request on the connection may have begun
                    self._client = None

        def _write(self, data: bytes) -> None:
            # h11's own bytes for a body without a length, which change nothing in it: through it they take as long
            # as all else that is done for a token. HTTP/1.0 knows no chunks, and reads until the end.
            if (self.conn.their_http_version or b"1.0") >= b"1.1":
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self.transport.write(data)

        def _arm(self) -> None:
            # Armed once per request: bytes that trickle in do not move it.
            if self._deadline is None:
                self._deadline = self.loop.call_later(header_timeout_s, self._late)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            idle = self.cycle is None or self.cycle.response_complete
            if idle and not self.transport.is_closing() and self.timeout_keep_alive_task is None:
                message = f"the request's headers did not arrive within {header_timeout_s:g} s"
                self._refuse(Refused(message, code="request_timeout", status=408), http_status=408)

        def _refuse(self, error: Refused, *, http_status: int) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = error.body.json()
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"connection", b"close"),
                ]
                start = h11.Response(status_code=http_status, headers=headers)
                for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
                if self.transport.can_write_eof() and not self.transport.is_closing():
                    self._linger()
                    return
            self.transport.close()

        def _linger(self) -> None:
            # Closed with bytes unread, the connection would be reset, and the answer lost on its way.
            self._is_refused = True
            self._disarm()
            self.transport.write_eof()
            self._deadline = self.loop.call_later(_LINGER_S, self.transport.abort)
            if self.cycle is not None and not self.cycle.response_complete:
                # Whoever waits for the body of the request waits no more.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self._client is not None:
                self._client.lose()

        def _discard(self, data: bytes) -> None:
            self._num_discarded += len(data)
            if self._num_discarded > _LINGER_BYTES:
                self.transport.abort()

    return DeadlineProtocol


def send_at_once(transport: asyncio.Transport) -> None:
    """Send what is written though the client has not acknowledged what was sent before (no Nagle's algorithm)."""
    # asyncio does so only where a listener names TCP as its protocol; those made as usual leave it to the kernel.
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def limit_unread(transport: asyncio.Transport, timeout_s: float) -> None:
    """End a connection on which nothing was read for this long, also one that was closed with bytes unsent."""
    # A closed transport still waits to send what it holds; only the kernel ends a connection that nobody reads.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000)))


class GracefulServer(uvicorn.Server):
    """Ends with status 0 after SIGTERM or SIGINT: uvicorn's own would end by the signal.

    Requests that were let in before are answered within the grace, or told after it to come again. Meanwhile it
    listens on, and tells others that it stops: whoever balances over several gateways hears of it by an answer,
    not by a refused connection.
    """

    def __init__(self, config: uvicorn.Config, admission: Admission, *, grace_s: float) -> None:
        super().__init__(config)
        self._admission = admission
        self._grace_s = grace_s
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """At the first signal stop in order; at the second end at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept requests, and say so."""
        await super().startup(sockets)
        if self.started:
            for listener in sockets or []:
                host, port = listener.getsockname()[:2]
                scheme = "https" if self.config.is_ssl else "http"
                _log.info("gateway ready", scheme=scheme, host=host, port=port)

    def stop(self) -> None:
        """Take no more requests, let running ones end within the grace, and end; at once when called again."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            self.config.timeout_graceful_shutdown = 0
            return
        self._admission.stop()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self._grace_s
        if not await self._is_idle_until(ends_s):
            ends_s = loop.time() + _FLUSH_S
            for task in tuple(self.server_state.tasks):
                task.cancel()  # each is answered with an error
            await self._is_idle_until(ends_s)
        # What uvicorn waits for then are clients that have not read their answers.
        self.config.timeout_graceful_shutdown = max(0, math.ceil(ends_s - loop.time()))
        self.should_exit = True

    async def _is_idle_until(self, ends_s: float) -> bool:
        """Wait for running requests; whether all had ended by then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(ends_s):
                await self._admission.wait_until_idle()
                return True
        return False


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the app."""
    tls = settings.server_tls
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol_with_deadlines(settings.header_timeout_s, settings.write_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        # uvicorn's own lines repeat what our access log says, and tell clients' malformed bytes as warnings.
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_context_factory=None if tls is None else _context_of(tls),
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


def _context_of(tls: ServerTls) -> Callable[[uvicorn.Config, Callable[[], ssl.SSLContext]], ssl.SSLContext]:
    """What makes uvicorn's context."""
    return lambda _config, _default: tls.followed_ssl_context()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError says which address is taken or cannot be."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
