"""Room on the device for adapters of one sort: how much is taken, who waits for some, and who could make some."""

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiter:
    """An adapter that waits for room; `turn` is done once the room is counted as taken."""

    num_rows: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True, kw_only=True)
class Room:
    """A number of adapters, and of rows of all of them together.

    Attributes:
        max_adapters, max_rows: how much there is.
        num_adapters, num_rows: how much is taken.
        idle: digests of adapters in it that nobody uses, the least recently used first.
        waiters: in the order in which they came.
    """

    max_adapters: int
    max_rows: int = 0
    num_adapters: int = 0
    num_rows: int = 0
    idle: OrderedDict[str, None] = field(default_factory=OrderedDict)
    waiters: deque[Waiter] = field(default_factory=deque)

    def fits(self, num_rows: int) -> bool:
        """Whether there is room for one more adapter, of so many rows."""
        return self.num_adapters < self.max_adapters and self.num_rows + num_rows <= self.max_rows

    def take(self, num_rows: int) -> None:
        """Count an adapter in."""
        self.num_adapters += 1
        self.num_rows += num_rows

    def give_back(self, num_rows: int) -> None:
        """Count an adapter out."""
        self.num_adapters -= 1
        self.num_rows -= num_rows

    def check(self) -> None:
        """Assert that nobody waits who need not."""
        assert 0 <= self.num_adapters <= self.max_adapters
        assert 0 <= self.num_rows <= self.max_rows
        waiting = [waiter for waiter in self.waiters if not waiter.turn.cancelled()]
        assert not waiting or not (self.idle or self.fits(waiting[0].num_rows)), "there is room and somebody waits"
