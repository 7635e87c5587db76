"""Which completions are let in: as many as may run and wait, and none that would wait too long for its turn.

A line that is bounded in length alone makes everybody late once more is asked for than can be computed: whoever
gets an answer has waited the whole line, and may have left. So a newcomer is told to come back where its turn
would come too late. When that would be is Little's law: how many are before it, over how many have ended in a
second of late. Tenants take turns, so before the newcomer are, of each tenant, no more than of its own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softprompt_api.shares import Shares

from softprompt_inference.engine.messages import Stats
from softprompt_inference.pace import Pace


class Admission:
    """Admits completions to one engine.

    Args:
        max_open: most that run or wait.
        max_wait_s: longest wait for a turn, as far as it can be foretold.
        load: the engine's load at its last step; `measure` is to be called at each.
        num_elsewhere: completions that wait for something else than the engine, in lines with bounds of their own.
        now: seconds.
    """

    def __init__(
        self,
        *,
        max_open: int,
        max_wait_s: float,
        load: Callable[[], Stats],
        num_elsewhere: Callable[[], int] = lambda: 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = Shares(max_open, what="completions run or wait", now=now)
        self._pace = Pace(max_wait_s=max_wait_s, now=now)
        self._load = load
        self._num_elsewhere = num_elsewhere
        self._now = now
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

    def measure(self, num_ended: int = 0) -> None:
        """Take in how the engine's line is now, and that some that it was given have ended, however they did."""
        self._pace.measure(num_ended, is_awaited=bool(self._load().waiting))

    def _check_wait(self, tenant: str) -> None:
        if not self._load().waiting:
            return  # whoever the engine has not told of yet starts in its next step
        self.measure()
        held = self._open.held
        self._pace.check(min(self._num_waiting, held[tenant] * len(held)))

    @property
    def _num_waiting(self) -> int:
        return max(0, self._open.held.total() - self._num_elsewhere() - self._load().running)
