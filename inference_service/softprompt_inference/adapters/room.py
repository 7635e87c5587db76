"""Room on the device for adapters of one sort: how much is taken, how many wait, and who could make some."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from softprompt_api.errors import Overloaded

from softprompt_inference.pace import Pace


@dataclass(slots=True, kw_only=True, eq=False)
class Room:
    """A number of adapters, and of rows of all of them together.

    Attributes:
        sort: what its adapters are, in words.
        settings: that say how much there is.
        max_adapters, max_rows: how much there is.
        pace: at which those come in who were short of it.
        num_adapters, num_rows: how much is taken.
        idle: adapters in it that nobody uses, the least recently used first, with their rows.
        pinned: adapters in it that do not leave, with their rows.
        num_waiting: requests that wait for some.
    """

    sort: str
    settings: str
    max_adapters: int
    max_rows: int = 0
    pace: Pace
    num_adapters: int = 0
    num_rows: int = 0
    idle: OrderedDict[str, int] = field(default_factory=OrderedDict)
    pinned: dict[str, int] = field(default_factory=dict)
    num_waiting: int = 0

    def could_hold(self, rows: Mapping[str, int]) -> bool:
        """Whether it has room for these adapters, by their rows, when it holds nothing else but what is pinned."""
        held = {**self.pinned, **rows}
        return len(held) <= self.max_adapters and sum(held.values()) <= self.max_rows

    def refusal(self, rows: Mapping[str, int]) -> str:
        """How many adapters are needed and how many there is room for, in words."""
        pinned = {digest: num_rows for digest, num_rows in self.pinned.items() if digest not in rows}
        num_rows, max_rows = sum(rows.values()), self.max_rows - sum(pinned.values())
        needed = self._amount(f"{len(rows)} {self.sort}", num_rows)
        room = self._amount(f"{self.max_adapters - len(pinned)}", max_rows)
        beside = f" beside {len(pinned)} pinned" if pinned else ""
        return f"{needed} at one time; there is room for {room}{beside} ({self.settings})"

    def _amount(self, adapters: str, num_rows: int) -> str:
        return f"{adapters} with {num_rows} virtual tokens" if self.max_rows else adapters

    def pin(self, digest: str, num_rows: int) -> None:
        """Have an adapter that is in it stay; Overloaded where that would leave nothing for others."""
        pinned = {**self.pinned, digest: num_rows}
        if len(pinned) >= self.max_adapters or sum(pinned.values()) >= self.max_rows > 0:
            are = self._amount(f"{len(self.pinned)} {self.sort}", sum(self.pinned.values()))
            most = self._amount(f"{self.max_adapters - 1}", self.max_rows - 1)
            raise Overloaded(f"{are} are pinned, and at most {most} may be; evict one")
        self.pinned = pinned

    def find_leavers(self, rows: Mapping[str, int], wanted: Collection[str]) -> list[str] | None:
        """The idle adapters that must leave before these fit, by their rows; None: they would not fit even then.

        Args:
            wanted: adapters that must not leave.
        """
        num_adapters, num_rows = self.num_adapters + len(rows), self.num_rows + sum(rows.values())
        leavers = []
        candidates = (each for each in self.idle.items() if each[0] not in wanted and each[0] not in self.pinned)
        while num_adapters > self.max_adapters or num_rows > self.max_rows:
            leaver, num_rows_of_leaver = next(candidates, (None, 0))
            if leaver is None:
                return None
            leavers.append(leaver)
            num_adapters -= 1
            num_rows -= num_rows_of_leaver
        return leavers

    def measure(self, num_came_in: int = 0) -> None:
        """Take in that some of those who waited have come in now, and whether others still wait."""
        self.pace.measure(num_came_in, is_awaited=self.num_waiting > 0)

    def take(self, digest: str, num_rows: int) -> None:
        """Count an adapter in, idle."""
        self.num_adapters += 1
        self.num_rows += num_rows
        self.idle[digest] = num_rows

    def give_back(self, digest: str) -> None:
        """Count an idle adapter out."""
        self.num_adapters -= 1
        self.num_rows -= self.idle.pop(digest)

    def check(self) -> None:
        """Assert that it holds no more than it can."""
        assert len(self.idle) <= self.num_adapters <= self.max_adapters
        assert sum(self.idle.values()) <= self.num_rows <= self.max_rows
        assert not self.pinned or len(self.pinned) < self.max_adapters
