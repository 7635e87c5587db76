"""Server-sent events as plain bytes, written as fast as the reader takes them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

import structlog
from softprompt_api.errors import InternalError, SoftpromptError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from softprompt_gateway.disconnect import stop, until_gone
from softprompt_gateway.errors import ClientGone, describe

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_log = structlog.get_logger()


def event(payload: bytes) -> bytes:
    """One event; the payload is JSON, which has no line breaks of its own."""
    return b"data: " + payload + b"\n\n"


class EventStream(Response):
    """Sends events until they end, fail, or the client leaves.

    A failure is told in a last event and the stream ends without `[DONE]`.

    Args:
        events: whole events, as `event` makes them.
        close: called once at the end, however it comes.
        write_timeout_s: how long one event may wait for its reader before the connection is given up.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], None],
        write_timeout_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; raise ClientGone if it could not be sent to its end."""
        patience = _Patience(self._write_timeout_s)
        writing = asyncio.create_task(self._write(scope, patience.watched(send)))
        leaving = asyncio.create_task(until_gone(receive))
        stalling = asyncio.create_task(patience.until_lost())
        try:
            await asyncio.wait({writing, leaving, stalling}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientGone
            writing.result()
        finally:
            self._close()
            await stop(writing, leaving, stalling)
            await self._events.aclose()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await self._send(send, chunk)
        except Exception as error:
            if isinstance(error, InternalError) or not isinstance(error, SoftpromptError):
                _log.exception("stream failed", request_id=scope["state"]["request_id"])
            await self._send(send, event(describe(error).json()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, chunk: bytes) -> None:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


class _Patience:
    """Notices a send that waits too long, with one timer for a whole stream instead of one for each event."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._now = asyncio.get_running_loop().time
        self._waits_since_s: float | None = None

    def watched(self, send: Send) -> Send:
        """The same `send`, watched."""

        async def watched_send(message: Message) -> None:
            self._waits_since_s = self._now()
            await send(message)
            self._waits_since_s = None

        return watched_send

    async def until_lost(self) -> None:
        """Return when a send has waited for the whole timeout."""
        left_s = self._timeout_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            waited_s = 0.0 if self._waits_since_s is None else self._now() - self._waits_since_s
            left_s = self._timeout_s - waited_s
