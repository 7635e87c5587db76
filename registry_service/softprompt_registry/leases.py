"""Leases: who holds one answers from the changes that it has taken, without asking.

No change of what names stand for is acknowledged before every holder has taken it, or its lease is over (C. Gray,
D. Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency", SOSP 1989).
"""

import asyncio
import time
from collections.abc import AsyncIterator

from softprompt_api.errors import Overloaded

from softprompt_registry.claim import Claim
from softprompt_registry.events import EventLog, Position, position_of
from softprompt_registry.stopping import Stopping


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
        self._holders: list[_Holder] = []

    async def hold(self, cursors: AsyncIterator[str]) -> AsyncIterator[float]:
        """For how long, since it sent a cursor up to which it has taken all changes, somebody has a lease.

        0: it was given none now. With "" it gives back what it has. Their end gives back nothing: the link may
        have broken, and whoever sent them believes in the lease.

        Raises:
            Overloaded: too many hold one.
            Unavailable: the registry stops, or the store is away.
        """
        holder = _Holder()
        async for cursor in self._stopping.through(cursors):
            if not cursor:
                holder.hold_until(0.0)
            yield await self._give(holder, position_of(cursor)) if cursor and self._lease_s else 0.0

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
        if holder not in self._holders:
            self._add(holder)
        holder.take(taken)
        # From here on changes wait for it; those that were made before are looked for now.
        before_s = holder.until_s
        holder.hold_until(asked_s + self._lease_s)
        is_given = False
        try:
            # In this order: who finds no claim waits for nobody, so what it has changed is looked for after that.
            # A cursor that is ahead is of another store.
            is_given = await self._claim.holds() and taken == position_of(await self._events.position())
        finally:
            if not is_given:
                holder.hold_until(before_s)
        return self._lease_s if is_given else 0.0

    def _add(self, holder: "_Holder") -> None:
        self._holders = self._held()
        if len(self._holders) >= self._max_holders:
            raise Overloaded(f"{len(self._holders)} leases are held, as many as are allowed")
        self._holders.append(holder)

    def _held(self) -> "list[_Holder]":
        now_s = time.monotonic()
        return [holder for holder in self._holders if holder.until_s > now_s]


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
