"""Which adapters the engine holds: brought in when first asked for, kept while used, dropped only when idle.

asked for ──▶ fetching (one task per digest) ──▶ waiting for room ──▶ resident, in use ◀──▶ resident, idle
                                                                                                │ room needed
                                                                                                ▼
                                                                                             dropped
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from softprompt_api.errors import AdapterInUse

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.host_cache import HostCache

_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """An adapter in memory, and how it is used.

    Attributes:
        tier: the fastest one that holds it.
        idle_s: since the last request let it go; 0 while it is used or was never asked for.
        hits: requests that asked for it, as far as is remembered.
        users: requests that use it now.
    """

    adapter: Adapter
    tier: Literal["host", "device"]
    idle_s: float
    hits: int
    users: int


@dataclass(slots=True, kw_only=True)
class _Usage:
    hits: int = 0
    released_s: float | None = None


@dataclass(slots=True, kw_only=True)
class _Entry:
    """An adapter that is being brought in (`adapter` is None) or is resident.

    Attributes:
        users: requests that use it or wait for it.
        bringing: ends with the adapter resident.
    """

    users: int = 0
    adapter: Adapter | None = None
    bringing: "asyncio.Task[Adapter]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiter:
    """An adapter that waits for room; `turn` is done once the room is counted as taken."""

    num_rows: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Residency:
    """Brings adapters in on demand and holds those in use; belongs to one event loop.

    Requests for one digest share one fetch. When everything resident is in use, further adapters wait their turn
    in order; requests for resident adapters never wait. A fetch that fails fails those who wait for it, and is
    tried anew by the next request.

    Args:
        fetch: gets a verified adapter by digest; may raise.
        load: tells the engine to take an adapter; ordered before later commands.
        drop: tells the engine to forget a digest.
        max_adapters: most adapters in the engine.
        max_rows: most virtual tokens of all adapters in the engine together; no adapter has more.
        host_cache: adapters kept in host memory.
    """

    def __init__(
        self,
        *,
        fetch: Callable[[str], Awaitable[Adapter]],
        load: Callable[[Adapter], None],
        drop: Callable[[str], None],
        max_adapters: int,
        max_rows: int,
        host_cache: HostCache,
    ) -> None:
        self._fetch = fetch
        self._load = load
        self._drop = drop
        self._max_adapters = max_adapters
        self._max_rows = max_rows
        self._host_cache = host_cache
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # resident without users, least recently used first
        self._waiters: deque[_Waiter] = deque()
        self._num_adapters = 0
        self._num_rows = 0
        self._usage: OrderedDict[str, _Usage] = OrderedDict()  # of adapters asked for lately, the last one last

    @asynccontextmanager
    async def use(self, digest: str) -> AsyncIterator[Adapter]:
        """Hold an adapter in the engine for the time of the context; waits until it is there."""
        entry = self._acquire(digest)
        try:
            # The task is everybody's: one waiter's cancellation must not reach it.
            adapter = await asyncio.shield(entry.bringing)
            yield adapter
        finally:
            self._release(digest, entry)

    def resident(self) -> list[Resident]:
        """What is in memory, the most recently used first."""
        held = {adapter.digest: self._describe(adapter, "host", 0) for adapter in self._host_cache.adapters()}
        for digest, entry in self._entries.items():
            if entry.adapter is not None:
                held[digest] = self._describe(entry.adapter, "device", entry.users)
        recency = {digest: place for place, digest in enumerate(self._usage)}
        return sorted(held.values(), key=lambda one: -recency.get(one.adapter.digest, -1))

    def evict(self, digest: str) -> bool:
        """Let an adapter go from all memory; False when it is not there.

        Raises:
            AdapterInUse: requests use it, or wait for it.
        """
        entry = self._entries.get(digest)
        if entry is not None and digest not in self._idle:
            raise AdapterInUse("requests use the adapter; it can go when they have ended", field="adapter")
        was_on_host = self._host_cache.discard(digest)
        if entry is None:
            return was_on_host
        del self._idle[digest]
        self._drop_resident(digest)
        return True

    async def close(self) -> None:
        """Stop bringing adapters in."""
        tasks = [entry.bringing for entry in self._entries.values() if not entry.bringing.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check(self) -> None:
        """Assert that the counters agree with the entries."""
        resident = {digest: entry for digest, entry in self._entries.items() if entry.adapter is not None}
        num_rows = sum(entry.adapter.num_virtual_tokens for entry in resident.values() if entry.adapter)
        granted = [entry for entry in self._entries.values() if entry.adapter is None]
        assert len(resident) <= self._num_adapters <= min(len(resident) + len(granted), self._max_adapters)
        assert num_rows <= self._num_rows <= self._max_rows
        assert granted or (len(resident), num_rows) == (self._num_adapters, self._num_rows)
        assert all(entry.users >= 0 for entry in self._entries.values())
        assert set(self._idle) == {digest for digest, entry in resident.items() if entry.users == 0}
        waiting = [waiter for waiter in self._waiters if not waiter.turn.cancelled()]
        assert not waiting or not (self._idle or self._fits(waiting[0].num_rows)), (
            "there is room and somebody waits"
        )
        self._host_cache.check()

    def _acquire(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            task = asyncio.create_task(self._bring(digest), name=f"bring {digest}")
            # Its failure is the waiters'; when they have all gone, nobody is left to be told.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            entry = self._entries[digest] = _Entry(bringing=task)
        entry.users += 1
        self._idle.pop(digest, None)
        self._usage.setdefault(digest, _Usage()).hits += 1
        self._usage.move_to_end(digest)
        if len(self._usage) > _MAX_REMEMBERED:
            self._usage.popitem(last=False)
        return entry

    def _release(self, digest: str, entry: _Entry) -> None:
        entry.users -= 1
        if usage := self._usage.get(digest):
            usage.released_s = monotonic()
        if entry.users or self._entries.get(digest) is not entry:
            return
        if entry.adapter is None:  # nobody waits for it any more
            del self._entries[digest]
            entry.bringing.cancel()
            return
        self._idle[digest] = None
        self._give_turns()

    async def _bring(self, digest: str) -> Adapter:
        entry = self._entries[digest]
        try:
            adapter = self._host_cache.get(digest)
            if adapter is None:
                adapter = await self._fetch(digest)
                self._host_cache.put(adapter)
            await self._load_in_turn(adapter)
        except BaseException:
            if self._entries.get(digest) is entry:
                del self._entries[digest]
            raise
        entry.adapter = adapter
        return adapter

    async def _load_in_turn(self, adapter: Adapter) -> None:
        """Have the engine take an adapter, once there is room and those that waited before had theirs."""
        assert adapter.num_virtual_tokens <= self._max_rows, "the source refuses such an adapter"
        waiter = _Waiter(num_rows=adapter.num_virtual_tokens)
        self._waiters.append(waiter)
        self._give_turns()
        try:
            await waiter.turn
            self._load(adapter)
        except BaseException:
            if not waiter.turn.cancelled():  # its room was counted
                self._return_room(waiter.num_rows)
            self._give_turns()
            raise

    def _give_turns(self) -> None:
        """Let waiters in, in order, as far as there is room; idle adapters make room."""
        while self._waiters:
            waiter = self._waiters[0]
            # Cancelling a task cancels the turn it awaits at once, and the task itself runs only later.
            if not waiter.turn.cancelled():
                if not self._make_room(waiter.num_rows):
                    return
                self._num_adapters += 1
                self._num_rows += waiter.num_rows
                waiter.turn.set_result(None)
            self._waiters.popleft()

    def _make_room(self, num_rows: int) -> bool:
        while not self._fits(num_rows) and self._idle:
            digest, _ = self._idle.popitem(last=False)
            self._drop_resident(digest)
        return self._fits(num_rows)

    def _drop_resident(self, digest: str) -> None:
        adapter = self._entries.pop(digest).adapter
        assert adapter is not None
        self._return_room(adapter.num_virtual_tokens)
        self._drop(digest)

    def _describe(self, adapter: Adapter, tier: Literal["host", "device"], users: int) -> Resident:
        usage = self._usage.get(adapter.digest, _Usage())
        idle_s = 0.0 if users or usage.released_s is None else monotonic() - usage.released_s
        return Resident(adapter=adapter, tier=tier, idle_s=idle_s, hits=usage.hits, users=users)

    def _fits(self, num_rows: int) -> bool:
        return self._num_adapters < self._max_adapters and self._num_rows + num_rows <= self._max_rows

    def _return_room(self, num_rows: int) -> None:
        self._num_adapters -= 1
        self._num_rows -= num_rows
