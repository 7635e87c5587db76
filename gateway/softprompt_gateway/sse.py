"""Server-sent events as plain bytes, written as fast as the reader takes them."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog
from softprompt_api.errors import InternalError, SoftpromptError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from softprompt_gateway.admission import stopping
from softprompt_gateway.connection import Connection
from softprompt_gateway.errors import ClientGone, ErrorBody, describe

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_log = structlog.get_logger()


def event(payload: bytes) -> bytes:
    """One event; the payload is JSON, which has no line breaks of its own."""
    return b"data: " + payload + b"\n\n"


class Events(Protocol):
    """Events that come by and by."""

    @property
    def has_more(self) -> bool:
        """Whether there is something to take, if only the end or an error."""

    @property
    def has_ended(self) -> bool:
        """Whether the last was taken."""

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever there is something to take; it does not raise."""

    def take(self) -> bytes:
        """Whole events that have come since the last look, if any; raises where they break off."""

    def close(self) -> None:
        """No more are wanted."""


def _error_event(error: ErrorBody) -> bytes:
    return event(error.json())


class EventStream(Response):
    """Sends events until they end, fail, or the client leaves.

    Each is written where it arrives, without waking a task. A failure is told in a last event and the stream ends
    without `[DONE]`. What a slow client has not read makes the events wait.

    Args:
        broken: spells a failure as last events.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: Events, *, headers: Mapping[str, str], broken: Callable[[ErrorBody], bytes] = _error_event
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events
        self._broken = broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the response; raise ClientGone if it could not be sent to its end."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            connection = Connection.of(scope)
            failed = await self._write(connection)
            if connection.is_gone:
                raise ClientGone
            last = b"" if failed is None else self._broken(_described(failed, scope["state"]["request_id"]))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._events.close()

    async def _write(self, connection: Connection) -> Exception | None:
        """Write what comes until the last; what it broke off with."""
        try:
            return await _Writing(self._events, connection).ended
        except asyncio.CancelledError:  # by the server, whose grace is over
            return stopping()


def _described(error: Exception, request_id: str) -> ErrorBody:
    """Why a stream breaks off."""
    if isinstance(error, InternalError) or not isinstance(error, SoftpromptError):
        _log.error("stream failed", request_id=request_id, exc_info=error)
    return describe(error)


class _Writing:
    """Writes events to a connection.

    Attributes:
        ended: done when all is written, or nobody reads it; what the events broke off with.
    """

    def __init__(self, events: Events, connection: Connection) -> None:
        self._events = events
        self._connection = connection
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        connection.follow(self._write)
        events.follow(self._write)
        self._write()

    def _write(self) -> None:
        if self.ended.done():
            return
        events, connection = self._events, self._connection
        try:
            has_more = not events.has_ended
            while has_more and connection.is_writable and not connection.is_gone:
                connection.write(events.take())
                has_more = events.has_more
        except Exception as error:
            self.ended.set_result(error)
        else:
            # The last is written when it too was read far enough: until then the connection counts the time.
            if connection.is_gone or (events.has_ended and connection.is_writable):
                self.ended.set_result(None)
