"""Which completions are let in: as many as may run and wait, and none that would wait too long for its turn.

A line that is bounded in length alone makes everybody late once more is asked for than can be computed: whoever
gets an answer has waited the whole line, and may have left. So a newcomer is told to come back where its turn
would come too late. When that would be is Little's law: how many are before it, over how many have ended in a
second of late. Tenants take turns, so before the newcomer are, of each tenant, no more than of its own.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softprompt_api.errors import Overloaded
from softprompt_api.shares import Shares

from softprompt_inference.engine.messages import Stats

# What ended so long ago counts for a third of what ends now.
_MEMORY_S = 15.0
# Further ahead nothing can be foretold: where few have ended, the foretold wait grows without bound.
_MAX_RETRY_S = 60.0


class Admission:
    """Admits completions to one engine.

    Args:
        max_open: most that run or wait.
        max_wait_s: longest wait for a turn, as far as it can be foretold.
        load: the engine's load at its last step.
        now: seconds.
    """

    def __init__(
        self,
        *,
        max_open: int,
        max_wait_s: float,
        load: Callable[[], Stats],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = Shares(max_open, what="completions run or wait", now=now)
        self._max_wait_s = max_wait_s
        self._load = load
        self._now = now
        # Both fade, and grow only while somebody waits: otherwise few end because few have come.
        self._num_ended = 0.0
        self._seconds = 0.0
        self._since_s: float | None = None  # when somebody was last seen to wait; None: nobody did
        self._idle_since_s = now()

    @contextmanager
    def admitted(self, num: int, tenant: str) -> Iterator[None]:
        """Some completions of a tenant, for the time of the context; Overloaded where they cannot be let in."""
        self._check_wait(tenant)
        with self._open.holding(tenant, num):
            try:
                yield
            finally:
                self._idle_since_s = self._now()

    @property
    def idle_s(self) -> float:
        """Seconds since a completion was in; 0 while one is."""
        return 0.0 if self._open.held else self._now() - self._idle_since_s

    def left(self, num: int) -> None:
        """Some that the engine had been given have ended, however they did."""
        self._measure(num)

    def _check_wait(self, tenant: str) -> None:
        self._measure(0)
        wait_s, most_s = self._wait_s(tenant), self._max_wait_s + _MAX_RETRY_S
        if wait_s > self._max_wait_s:
            wait = f"about {wait_s:.0f} s" if wait_s <= most_s else f"more than {most_s:.0f} s"
            raise Overloaded(
                f"the wait would be {wait}, and at most {self._max_wait_s:g} s may be waited; try again later",
                details={"retry_after_ms": str(math.ceil((min(wait_s, most_s) - self._max_wait_s) * 1000))},
            )

    def _wait_s(self, tenant: str) -> float:
        """How long a newcomer would wait; 0 where nothing is known."""
        held = self._open.held
        num_before = min(self._num_waiting, held[tenant] * len(held))
        return num_before * self._seconds / self._num_ended if self._num_ended else 0.0

    @property
    def _num_waiting(self) -> int:
        return max(0, self._open.held.total() - self._load().running)

    def _measure(self, num_ended: int) -> None:
        """Take in that some have ended now."""
        now_s, since_s = self._now(), self._since_s
        if since_s is not None:
            fading = math.exp((since_s - now_s) / _MEMORY_S)
            self._num_ended = self._num_ended * fading + num_ended
            self._seconds = self._seconds * fading + now_s - since_s
        self._since_s = now_s if self._load().waiting else None
