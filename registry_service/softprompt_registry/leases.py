"""Leases: who holds one answers from the changes that it has taken, without asking.

No change of what names stand for is acknowledged before every holder has taken it, or its lease is over (C. Gray,
D. Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency", SOSP 1989).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument, Overloaded

from softprompt_registry.claim import Claim
from softprompt_registry.events import EventLog, Position, position_of
from softprompt_registry.stopping import Stopping

_MAX_ID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A holder has taken every change up to a cursor."""

    holder: str
    cursor: str


class Leases:
    """Gives leases, a bounded number of them, and waits for their holders.

    Args:
        lease_s: for how long a lease holds; 0: none is given.
    """

    def __init__(
        self, events: EventLog, claim: Claim, stopping: Stopping, *, lease_s: float, max_holders: int
    ) -> None:
        self._events = events
        self._claim = claim
        self._stopping = stopping
        self._lease_s = lease_s
        self._max_holders = max_holders
        self._holders: dict[str, _Holder] = {}

    async def hold(self, messages: AsyncIterator[Taken]) -> AsyncIterator[float]:
        """For each message, for how long from when it was sent its holder has a lease; 0: it was given none now.

        Raises:
            Overloaded: too many hold one.
            Unavailable: the registry stops, or the store is away.
        """
        holder: _Holder | None = None
        while True:
            try:
                taken = await self._stopping.or_else(anext(messages))
            except StopAsyncIteration:  # and not where the link broke: then it may believe in its lease
                if holder is not None:
                    holder.hold_until(0.0)
                return
            holder = self._holder(taken.holder)
            yield await self._give(holder, position_of(taken.cursor)) if self._lease_s else 0.0

    async def settle(self) -> None:
        """Return once nobody answers from before a change that was made before this call."""
        await self._claim.settle()
        if self._held():
            position = position_of(await self._events.position())
            for holder in self._held():
                await holder.reach(position)

    async def close(self) -> None:
        """Leave it to the next registry to give leases, where none of this one's are held."""
        if not self._held():
            await self._claim.release()

    async def _give(self, holder: "_Holder", taken: Position) -> float:
        asked_s = time.monotonic()
        holder.take(taken)
        # From here on changes wait for it; those that were made before are looked for now.
        before_s = holder.until_s
        holder.hold_until(asked_s + self._lease_s)
        is_given = False
        try:
            newest = position_of(await self._events.position())
            # A cursor that is ahead is of another store.
            is_given = taken == newest and await self._claim.holds()
        finally:
            if not is_given:
                holder.hold_until(before_s)
        return self._lease_s if is_given else 0.0

    def _holder(self, name: str) -> "_Holder":
        if (holder := self._holders.get(name)) is not None:
            return holder
        if not 1 <= len(name) <= _MAX_ID:
            raise InvalidArgument(f"holder must have 1 to {_MAX_ID} characters", field="holder")
        held = self._held()
        if len(held) >= self._max_holders:
            raise Overloaded(f"{len(held)} leases are held, as many as are allowed")
        holder = _Holder()
        self._holders = {name: one for name, one in self._holders.items() if one in held} | {name: holder}
        return holder

    def _held(self) -> "list[_Holder]":
        now_s = time.monotonic()
        return [holder for holder in self._holders.values() if holder.until_s > now_s]


class _Holder:
    """Until when somebody may have a lease, and what it has taken."""

    def __init__(self) -> None:
        self.until_s = 0.0
        self._taken: Position = (0, 0)
        self._changed = asyncio.Event()

    def take(self, position: Position) -> None:
        self._taken = position
        self._tell()

    def hold_until(self, until_s: float) -> None:
        self.until_s = until_s
        self._tell()

    async def reach(self, position: Position) -> None:
        """Return once it has taken what is there, or has no lease."""
        while self._taken < position and (left_s := self.until_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
