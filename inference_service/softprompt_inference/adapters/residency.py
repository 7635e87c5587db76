"""Which adapters the engine holds: brought in when first asked for, kept while used, dropped only when idle.

asked for ──▶ fetching (one task per digest) ──▶ waiting for room ──▶ resident, in use ◀──▶ resident, idle
                                                                                                │ room needed
                                                                                                ▼
                                                                                             dropped
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from time import monotonic
from typing import Literal

from softprompt_api.errors import AdapterInUse

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.room import Room, Waiter

_MAX_REMEMBERED = 65_536


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What one tier holds. An adapter on the device may be in host memory too, and counts in both.

    Attributes:
        hits: requests that found their adapter in it, and in no faster one.
    """

    name: Literal["host", "device"]
    num_adapters: int
    size_bytes: int
    hits: int


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


class Residency:
    """Brings adapters in on demand and holds those in use; belongs to one event loop.

    Requests for one digest share one fetch. When everything resident is in use, further adapters wait their turn
    in order; requests for resident adapters never wait. Soft prompts and LoRAs have room of their own each, and
    never wait for one another. A fetch that fails fails those who wait for it, and is tried anew by the next
    request.

    Args:
        fetch: gets a verified adapter by digest; may raise.
        load: tells the engine to take an adapter; ordered before later commands.
        drop: tells the engine to forget a digest.
        max_adapters: most soft prompts in the engine.
        max_rows: most virtual tokens of all adapters in the engine together; no adapter has more.
        max_loras: most LoRAs in the engine.
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
        max_loras: int,
        host_cache: HostCache,
    ) -> None:
        self._fetch = fetch
        self._load = load
        self._drop = drop
        self._soft_prompts = Room(max_adapters=max_adapters, max_rows=max_rows)
        self._loras = Room(max_adapters=max_loras)
        self._host_cache = host_cache
        self._entries: dict[str, _Entry] = {}
        self._leaving: set[asyncio.Task[Adapter]] = set()  # cancelled, and yet to give room back that they took
        self._usage: OrderedDict[str, _Usage] = OrderedDict()  # of adapters asked for lately, the last one last
        self._hits: Counter[str] = Counter()  # requests by where their adapter was
        self._device_bytes = 0

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

    def resident(self, limit: int | None = None) -> list[Resident]:
        """What is in memory, the most recently used first; no more than `limit`."""
        found: dict[str, Resident] = {}
        for digest in chain(reversed(self._usage), self._entries, self._host_cache.digests()):
            if len(found) == limit:
                break
            if digest not in found and (held := self._find(digest)):
                found[digest] = held
        return list(found.values())

    @property
    def num_resident(self) -> int:
        """How many adapters are in memory."""
        on_device = [digest for digest, entry in self._entries.items() if entry.adapter is not None]
        return len(self._host_cache) + sum(digest not in self._host_cache for digest in on_device)

    def tiers(self) -> list[Tier]:
        """What each tier holds, the fastest first."""
        rooms = (self._soft_prompts, self._loras)
        device = Tier(
            name="device",
            num_adapters=sum(room.num_adapters for room in rooms),
            size_bytes=self._device_bytes,
            hits=self._hits["device"],
        )
        host = Tier(
            name="host",
            num_adapters=len(self._host_cache),
            size_bytes=self._host_cache.size_bytes,
            hits=self._hits["host"],
        )
        return [device, host]

    @property
    def misses(self) -> int:
        """Requests whose adapter was in no tier."""
        return self._hits["registry"]

    def evict(self, digest: str) -> bool:
        """Let an adapter go from all memory; False when it is not there.

        Raises:
            AdapterInUse: requests use it, or wait for it.
        """
        entry = self._entries.get(digest)
        if entry is not None and (entry.users or entry.adapter is None):
            raise AdapterInUse("requests use the adapter; it can go when they have ended", field="adapter")
        was_on_host = self._host_cache.discard(digest)
        if entry is None or entry.adapter is None:
            return was_on_host
        del self._room_of(entry.adapter).idle[digest]
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
        assert all(entry.users >= 0 for entry in self._entries.values())
        num_granted = len(self._leaving) + sum(entry.adapter is None for entry in self._entries.values())
        for room in (self._soft_prompts, self._loras):
            held = [one for one in self._entries.values() if one.adapter and self._room_of(one.adapter) is room]
            adapters = [entry.adapter for entry in held if entry.adapter]
            num_rows = sum(adapter.num_virtual_tokens for adapter in adapters)
            assert len(adapters) <= room.num_adapters <= len(adapters) + num_granted
            assert num_rows <= room.num_rows
            assert num_granted or (len(adapters), num_rows) == (room.num_adapters, room.num_rows)
            assert set(room.idle) == {one.adapter.digest for one in held if one.adapter and not one.users}
            room.check()
        on_device = [entry.adapter.size_bytes for entry in self._entries.values() if entry.adapter]
        assert self._device_bytes == sum(on_device)
        self._host_cache.check()

    def _acquire(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        on_device = entry is not None and entry.adapter is not None
        self._hits["device" if on_device else "host" if digest in self._host_cache else "registry"] += 1
        if entry is None:
            task = asyncio.create_task(self._bring(digest), name=f"bring {digest}")
            # Its failure is the waiters'; when they have all gone, nobody is left to be told.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            entry = self._entries[digest] = _Entry(bringing=task)
        entry.users += 1
        if entry.adapter is not None:
            self._room_of(entry.adapter).idle.pop(digest, None)
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
            self._leaving.add(entry.bringing)
            entry.bringing.add_done_callback(self._leaving.discard)
            # Its turn is cancelled at once, and others may have waited behind it.
            for room in (self._soft_prompts, self._loras):
                self._give_turns(room)
            return
        room = self._room_of(entry.adapter)
        room.idle[digest] = None
        self._give_turns(room)

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
        self._device_bytes += adapter.size_bytes
        return adapter

    async def _load_in_turn(self, adapter: Adapter) -> None:
        """Have the engine take an adapter, once there is room and those that waited before had theirs."""
        room = self._room_of(adapter)
        assert adapter.num_virtual_tokens <= room.max_rows, "the source refuses such an adapter"
        waiter = Waiter(num_rows=adapter.num_virtual_tokens)
        room.waiters.append(waiter)
        self._give_turns(room)
        try:
            await waiter.turn
            self._load(adapter)
        except BaseException:
            if not waiter.turn.cancelled():  # its room was counted
                room.give_back(waiter.num_rows)
            self._give_turns(room)
            raise

    def _give_turns(self, room: Room) -> None:
        """Let waiters in, in order, as far as there is room; idle adapters make room."""
        while room.waiters:
            waiter = room.waiters[0]
            # Cancelling a task cancels the turn it awaits at once, and the task itself runs only later.
            if not waiter.turn.cancelled():
                if not self._make_room(room, waiter.num_rows):
                    return
                room.take(waiter.num_rows)
                waiter.turn.set_result(None)
            room.waiters.popleft()

    def _make_room(self, room: Room, num_rows: int) -> bool:
        while not room.fits(num_rows) and room.idle:
            digest, _ = room.idle.popitem(last=False)
            self._drop_resident(digest)
        return room.fits(num_rows)

    def _drop_resident(self, digest: str) -> None:
        adapter = self._entries.pop(digest).adapter
        assert adapter is not None
        self._device_bytes -= adapter.size_bytes
        self._room_of(adapter).give_back(adapter.num_virtual_tokens)
        self._drop(digest)

    def _room_of(self, adapter: Adapter) -> Room:
        return self._loras if adapter.is_lora else self._soft_prompts

    def _find(self, digest: str) -> Resident | None:
        """An adapter that is in memory."""
        entry = self._entries.get(digest)
        if entry is not None and entry.adapter is not None:
            return self._describe(entry.adapter, "device", entry.users)
        adapter = self._host_cache.peek(digest)
        return self._describe(adapter, "host", 0) if adapter else None

    def _describe(self, adapter: Adapter, tier: Literal["host", "device"], users: int) -> Resident:
        usage = self._usage.get(adapter.digest, _Usage())
        idle_s = 0.0 if users or usage.released_s is None else monotonic() - usage.released_s
        return Resident(adapter=adapter, tier=tier, idle_s=idle_s, hits=usage.hits, users=users)
