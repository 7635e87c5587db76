"""What tenants may hold at the same time of something that there is so much of: none of them all of it.

A tenant may hold as much as is free: one that floods has half, two a third each, and whoever comes next finds room
(dynamic thresholds, Choudhury and Hahne 1998). Where nobody else has come of late, one tenant may hold everything.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softprompt_api.errors import Overloaded

# Whoever asked so lately is reckoned with.
_MEMORY_S = 60.0


class Shares:
    """Counts what tenants hold.

    Args:
        most: that there is.
        what: it is, and what is done with it: "uploads are running".
        now: seconds.

    Attributes:
        held: by tenant.
    """

    def __init__(self, most: int, *, what: str, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._what = what
        self._now = now
        self._asked_s: dict[str, float] = {}  # when each tenant last did, the latest at the end
        self.held: Counter[str] = Counter()

    @contextmanager
    def holding(self, tenant: str, num: int = 1) -> Iterator[None]:
        """Some of it, for the time of the context; Overloaded where that is too much."""
        self._check(tenant, num)
        self.held[tenant] += num
        try:
            yield
        finally:
            self.held[tenant] -= num
            if not self.held[tenant]:
                del self.held[tenant]

    def _check(self, tenant: str, num: int) -> None:
        self._remember(tenant)
        total = self.held.total()
        free = self._most - total
        if num > free:
            raise Overloaded(f"{total} {self._what}, and at most {self._most} may; try again later")
        own = self.held[tenant]
        if len(self._asked_s) > 1 and own + num > free:
            raise Overloaded(f"{own} of this tenant's {self._what}, and the rest is for others; try again later")

    def _remember(self, tenant: str) -> None:
        now_s = self._now()
        self._asked_s.pop(tenant, None)
        self._asked_s[tenant] = now_s
        while self._asked_s[oldest := next(iter(self._asked_s))] <= now_s - _MEMORY_S:
            del self._asked_s[oldest]
