"""Lines in which tenants take turns, and each tenant's come in order of arrival.

Round robin: a newcomer is behind all that have no more of their own tenant before them than it has. So a tenant
that has sent a thousand holds up nobody who has sent one, and who is its tenant's first is overtaken by nobody.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar


class OfTenant(Protocol):
    """Whatever stands in a line."""

    @property
    def tenant(self) -> str: ...


T = TypeVar("T", bound=OfTenant)


def line_up(line: list[T], newcomer: T) -> None:
    """Put a newcomer where its turn is."""
    num_own: Counter[str] = Counter()
    rounds = []
    for one in line:
        rounds.append(num_own[one.tenant])
        num_own[one.tenant] += 1
    place = len(line)
    while place and rounds[place - 1] > num_own[newcomer.tenant]:
        place -= 1
    line.insert(place, newcomer)


@dataclass(slots=True, kw_only=True, eq=False)
class _Turn:
    tenant: str
    given: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Places:
    """A semaphore for which tenants wait in turn.

    Args:
        num: how many may have a place at the same time.
    """

    def __init__(self, num: int) -> None:
        self._num_free = num
        self._line: list[_Turn] = []

    @property
    def has_free(self) -> bool:
        """Whether somebody would have a place at once."""
        return self._num_free > 0

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """A place, for the time of the context."""
        turn = _Turn(tenant=tenant)
        line_up(self._line, turn)
        self._give_turns()
        try:
            await turn.given
            yield
        finally:
            if turn in self._line:
                self._line.remove(turn)
            elif not turn.given.cancelled():
                self._num_free += 1
                self._give_turns()

    def _give_turns(self) -> None:
        while self._num_free and self._line:
            given = self._line.pop(0).given
            if not given.cancelled():  # who waited for it may not have heard yet
                self._num_free -= 1
                given.set_result(None)
