"""The front's end of the socket to the engine: a message is handed out where its last byte arrives."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Self, cast

from softprompt_inference.engine import files
from softprompt_inference.engine.codec import HEADER, Message, contents_of, decode, encode

# Holds a step's results; longer messages make it grow.
_BUFFER_BYTES = 2**16


class Pipe(asyncio.BufferedProtocol):
    """Whole messages, both ways. It reads into one buffer and wakes no task: both count for every step.

    Args:
        hear: is called with each message.
        to_files: the socket that takes files.

    Attributes:
        ended: done when the socket has; the error is what a message, or `hear`, failed with.
    """

    _transport: asyncio.Transport

    def __init__(self, hear: Callable[[Message], None], to_files: socket.socket) -> None:
        """Made by `connect`."""
        self._hear = hear
        self._to_files = to_files
        self._buffer = bytearray(_BUFFER_BYTES)
        self._num_read = 0
        self._error: Exception | None = None
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(
        cls, connected: socket.socket, to_files: socket.socket, hear: Callable[[Message], None]
    ) -> Self:
        """Over connected sockets, which it owns from now on."""
        _, pipe = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(hear, to_files), sock=connected
        )
        return pipe

    def send(self, message: Message) -> None:
        """Send a message; it is lost where the socket has ended. Raises Unavailable where no file is taken."""
        if contents := contents_of(message):
            with contextlib.suppress(ConnectionError):
                files.hand_over(self._to_files, contents)
        self._transport.write(encode(message))

    def close(self) -> None:
        """End the socket, after what was sent."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ready."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - an end is an end
        """The socket has ended."""
        self._to_files.close()
        self.ended.set_result(self._error)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - a hint
        """Where the next bytes go."""
        return memoryview(self._buffer)[self._num_read :]

    def buffer_updated(self, nbytes: int) -> None:
        """Hand out the messages that are whole."""
        self._num_read += nbytes
        try:
            self._keep(self._hand_out())
        except Exception as error:
            self._error = error
            self._num_read = 0
            self._transport.abort()

    def _hand_out(self) -> int:
        """Where the first message begins that is not whole."""
        start = 0
        with memoryview(self._buffer) as view:
            while (end := self._end_of_message(start)) <= self._num_read:
                self._hear(decode(view[start + HEADER.size : end]))
                start = end
        return start

    def _end_of_message(self, start: int) -> int:
        body = start + HEADER.size
        return body if body > self._num_read else body + int(HEADER.unpack_from(self._buffer, start)[0])

    def _keep(self, start: int) -> None:
        """Move what is left to the front of the buffer, and make room for the message that it begins."""
        needed = self._end_of_message(start) - start
        left = self._buffer[start : self._num_read]
        self._num_read = len(left)
        if needed > len(self._buffer):
            self._buffer = bytearray(needed)
        self._buffer[: len(left)] = left
