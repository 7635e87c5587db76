"""The client's end of a request: who answers hears at once when it leaves, and writes without a task to wait.

ASGI tells a client's leaving to a task that waits for it, and sends a body by a task that wakes for each piece. A
stream of tokens has a piece for every step of the engine, and both would cost more than the piece.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from starlette.types import Scope

_EXTENSION = "softprompt.connection"


class Connection:
    """One request's client, over the protocol of `server`.

    Args:
        write: frames and writes a piece of the answer's body; never called once the client has gone.
        write_timeout_s: how long the client may read nothing while something waits for it; then it counts as gone.

    Attributes:
        is_gone: nobody will read any more.
        is_writable: the client reads as fast as it is written to.
    """

    def __init__(self, write: Callable[[bytes], None], *, write_timeout_s: float) -> None:
        self._write = write
        self._write_timeout_s = write_timeout_s
        self._giving_up: asyncio.TimerHandle | None = None
        self._notify: Callable[[], None] | None = None
        self.is_gone = False
        self.is_writable = True

    @classmethod
    def of(cls, scope: Scope) -> "Connection":
        """A request's."""
        return cast(Connection, scope["extensions"][_EXTENSION])

    def attach(self, scope: Scope) -> None:
        """Be this request's."""
        scope.setdefault("extensions", {})[_EXTENSION] = self

    def follow(self, notify: Callable[[], None] | None) -> None:
        """Call `notify`, instead of any before, when the client has left or can be written to again."""
        self._notify = notify

    def write(self, data: bytes) -> None:
        """Write a piece of the body, once the answer has started. What is not read at once waits in memory."""
        if data and not self.is_gone:
            self._write(data)

    def pause(self) -> None:
        """Much of what was written waits to be read."""
        self.is_writable = False
        if self._giving_up is None:
            self._giving_up = asyncio.get_running_loop().call_later(self._write_timeout_s, self.lose)

    def resume(self) -> None:
        """Most of it was read."""
        self.is_writable = True
        self._wait_no_more()
        self._tell()

    def lose(self) -> None:
        """The client has left, or is given up."""
        self.is_gone = True
        self._wait_no_more()
        self._tell()

    def _wait_no_more(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _tell(self) -> None:
        if self._notify is not None:
            self._notify()
