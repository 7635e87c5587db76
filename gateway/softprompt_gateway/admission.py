"""Which requests are answered: so many at the same time, and no new ones once the gateway stops."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from softprompt_api.errors import Overloaded, Unavailable

# Health checks pass: a busy gateway must not be restarted for it.
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
# A gateway that stops is alive, and not ready.
_ANSWERED_TO_THE_END = frozenset({"/health/live", "/metrics"})


def stopping() -> Unavailable:
    """What a gateway that stops tells those whom it does not answer."""
    return Unavailable("this gateway is stopping; try again")


class Admission:
    """Lets requests in.

    Args:
        max_requests: most that are answered at the same time.

    Attributes:
        num_running: requests that were let in and are not answered yet.
        is_stopping: whether those are the last.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.num_running = 0
        self.is_stopping = False

    @contextmanager
    def admitted(self, path: str) -> Iterator[None]:
        """A request, for the time of the context; Overloaded or Unavailable where it must come again."""
        if self.is_stopping and path not in _ANSWERED_TO_THE_END:
            raise stopping()
        if self.num_running >= self._max_requests and path not in QUIET_PATHS:
            raise Overloaded(f"{self._max_requests} requests are being answered already; try again")
        self.num_running += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if not self.num_running:
                self._is_idle.set()

    def stop(self) -> None:
        """Let no more in."""
        self.is_stopping = True

    async def wait_until_idle(self) -> None:
        """Return once nothing runs."""
        await self._is_idle.wait()
