"""Which adapters the engine holds: brought in when first asked for, kept while used, dropped only when idle.

asked for ──▶ fetching (one task per digest) ──▶ waiting for room ──▶ resident, in use ◀──▶ resident, idle
                                                                                                │ room needed
                                                                                                ▼
                                                                                             dropped

A request that needs several adapters gets all of them at once or waits for all of them, and holds none while it
waits: two requests can never wait for each other.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic
from typing import Literal

from softprompt_api.errors import AdapterInUse, InvalidArgument, Unavailable
from softprompt_api.tracing import span

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.room import Room

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


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """An adapter that requests ask for, or that is resident.

    Attributes:
        fetched: the adapter, in host memory; a task where it has to be fetched.
        num_asking: requests that use it, or wait for it or for another beside it.
        num_using: requests that use it, and keep it resident.
        waiters: requests in line for it.
    """

    digest: str
    fetched: "Adapter | asyncio.Task[Adapter]"
    num_asking: int = 0
    num_using: int = 0
    is_resident: bool = False
    waiters: "dict[_Waiter, None]" = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The adapter; it must have been fetched."""
        assert isinstance(self.fetched, Adapter)
        return self.fetched

    @property
    def tier(self) -> Literal["device", "host", "registry"]:
        """The fastest one that holds it."""
        if self.is_resident:
            return "device"
        return "host" if isinstance(self.fetched, Adapter) else "registry"

    @property
    def num_rows(self) -> int:
        """Its virtual tokens."""
        return self.adapter.num_virtual_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiter:
    """A request in line, once for all rooms in which it has adapters; `turn` is done when it holds all of them."""

    entries: Sequence[_Entry]
    rooms: "Sequence[Room[_Waiter]]"
    turn: "asyncio.Future[None]"


class Residency:
    """Brings adapters in on demand and holds those in use; belongs to one event loop.

    Requests for one digest share one fetch. When everything resident is in use, requests for further adapters wait
    their turn; those whose adapters are all resident never wait. Soft prompts and LoRAs have room of their own: a
    request is in the line of each that it needs, and has its turn when it is the first in all of them. A failed
    fetch is the failure of those who wait for it, and is tried anew by the next request.

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
        self._soft_prompts = Room[_Waiter](sort="soft prompts", max_adapters=max_adapters, max_rows=max_rows)
        self._loras = Room[_Waiter](sort="LoRAs", max_adapters=max_loras)
        self._rooms = (self._soft_prompts, self._loras)
        self._host_cache = host_cache
        self._entries: dict[str, _Entry] = {}
        self._usage: OrderedDict[str, _Usage] = OrderedDict()  # of adapters asked for lately, the last one last
        self._hits: Counter[str] = Counter()  # requests by where their adapter was
        self._device_bytes = 0

    @asynccontextmanager
    async def use(
        self, *digests: str, check: Callable[[Sequence[Adapter]], object] | None = None
    ) -> AsyncIterator[Sequence[Adapter]]:
        """Hold adapters in the engine for the time of the context; waits until all of them are there.

        Args:
            check: looks at them before they take room; what it raises ends the wait.

        Raises InvalidArgument where they do not fit the device together, even alone.
        """
        entries = {digest: self._ask_for(digest) for digest in dict.fromkeys(digests)}
        try:
            with span("adapters"):
                adapters = [await self._fetched(entries[digest]) for digest in digests]
                if check is not None:
                    check(adapters)
                await self._hold_in_turn(list(entries.values()))
            try:
                yield adapters
            finally:
                self._let_go(entries.values())
        finally:
            for entry in entries.values():
                self._forget(entry)

    def resident(self, limit: int | None = None) -> list[Resident]:
        """What is in memory, the most recently used first; no more than `limit`."""
        held: dict[str, Resident] = {}
        for digest in chain(reversed(self._usage), self._entries, self._host_cache.digests()):
            if len(held) == limit:
                break
            if digest not in held and (resident := self._find_resident(digest)):
                held[digest] = resident
        return list(held.values())

    @property
    def num_resident(self) -> int:
        """How many adapters are in memory."""
        on_device = [digest for digest, entry in self._entries.items() if entry.is_resident]
        return len(self._host_cache) + sum(digest not in self._host_cache for digest in on_device)

    def tiers(self) -> list[Tier]:
        """What each tier holds, the fastest first."""
        device = Tier(
            name="device",
            num_adapters=sum(room.num_adapters for room in self._rooms),
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

    @property
    def max_loras(self) -> int:
        """Most LoRAs in the engine."""
        return self._loras.max_adapters

    def loras_asked_for(self) -> tuple[list[str], list[str]]:
        """Names of the LoRAs that requests use, and of those that requests wait for."""
        known = [entry for entry in self._entries.values() if isinstance(entry.fetched, Adapter)]
        loras = [entry for entry in known if entry.adapter.is_lora]
        running = {entry.adapter.name for entry in loras if entry.num_using}
        waiting = {entry.adapter.name for entry in loras if entry.num_asking > entry.num_using}
        return sorted(running), sorted(waiting)

    def evict(self, digest: str) -> bool:
        """Let an adapter go from all memory; False when it is not there.

        Raises:
            AdapterInUse: requests use it, or wait for it.
        """
        entry = self._entries.get(digest)
        if entry is not None and entry.num_asking:
            raise AdapterInUse("requests use the adapter; it can go when they have ended", field="adapter")
        was_on_host = self._host_cache.discard(digest)
        if entry is None:
            return was_on_host
        self._drop_resident(entry)
        return True

    async def close(self) -> None:
        """Stop bringing adapters in."""
        tasks = [entry.fetched for entry in self._entries.values() if isinstance(entry.fetched, asyncio.Task)]
        for task in tasks:
            task.cancel()
        for waiter in {waiter for room in self._rooms for waiter in room.line}:
            self._leave_line(waiter)
            waiter.turn.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def refuse(self) -> None:
        """End the wait of all who are in line for room: the engine has ended."""
        for waiter in {waiter for room in self._rooms for waiter in room.line}:
            self._leave_line(waiter)
            waiter.turn.set_exception(Unavailable("the engine has ended; try again"))

    def check(self) -> None:
        """Assert that the counters agree with the entries, and that nobody waits who need not."""
        for entry in self._entries.values():
            assert 0 <= entry.num_using <= entry.num_asking
            assert entry.is_resident or (entry.num_asking and not entry.num_using)
        for room in self._rooms:
            held = [one for one in self._entries.values() if one.is_resident and self._room_of(one) is room]
            assert (len(held), sum(one.num_rows for one in held)) == (room.num_adapters, room.num_rows)
            assert dict(room.idle) == {one.digest: one.num_rows for one in held if not one.num_using}
            assert self._find_turn(room) is None, "there is room and somebody waits"
            assert not any(_are_resident(waiter.entries) for waiter in room.line), "they wait for what is there"
            room.check()
        on_device = [entry.adapter.size_bytes for entry in self._entries.values() if entry.is_resident]
        assert self._device_bytes == sum(on_device)
        self._host_cache.check()

    def _ask_for(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(digest=digest, fetched=self._find(digest))
        self._hits[entry.tier] += 1
        entry.num_asking += 1
        self._usage.setdefault(digest, _Usage()).hits += 1
        self._usage.move_to_end(digest)
        if len(self._usage) > _MAX_REMEMBERED:
            self._usage.popitem(last=False)
        return entry

    def _find(self, digest: str) -> "Adapter | asyncio.Task[Adapter]":
        if adapter := self._host_cache.get(digest):
            return adapter
        task = asyncio.create_task(self._bring(digest), name=f"fetch {digest}")
        # Its failure is told to who waits for it; when they have all gone, nobody is left to be told.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _bring(self, digest: str) -> Adapter:
        entry = self._entries[digest]
        try:
            adapter = await self._fetch(digest)
        except BaseException:
            if self._entries.get(digest) is entry:
                del self._entries[digest]
            raise
        self._host_cache.put(adapter)
        entry.fetched = adapter
        return adapter

    async def _fetched(self, entry: _Entry) -> Adapter:
        # The task is everybody's: one waiter's cancellation must not reach it.
        return entry.fetched if isinstance(entry.fetched, Adapter) else await asyncio.shield(entry.fetched)

    def _forget(self, entry: _Entry) -> None:
        """One request less asks for it."""
        entry.num_asking -= 1
        if usage := self._usage.get(entry.digest):
            usage.released_s = monotonic()
        if entry.num_asking or entry.is_resident or self._entries.get(entry.digest) is not entry:
            return
        del self._entries[entry.digest]
        if isinstance(entry.fetched, asyncio.Task):
            entry.fetched.cancel()

    async def _hold_in_turn(self, entries: Sequence[_Entry]) -> None:
        """Keep adapters in the engine, from when it has all of them, or it is their turn to come in together."""
        if _are_resident(entries):
            self._hold(entries)
            return
        waiter = self._line_up(entries)
        self._give_turns()
        try:
            # Shielded: the turn is given or not, whatever becomes of who waits.
            await asyncio.shield(waiter.turn)
        except BaseException:
            if not waiter.turn.done():
                self._leave_line(waiter)
                self._give_turns()
            elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._let_go(entries)
            raise

    def _hold(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.num_using += 1
            self._room_of(entry).idle.pop(entry.digest, None)

    def _let_go(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            entry.num_using -= 1
            if not entry.num_using:
                self._room_of(entry).idle[entry.digest] = entry.num_rows
        self._give_turns()

    def _line_up(self, entries: Sequence[_Entry]) -> _Waiter:
        rooms = [room for room in self._rooms if any(self._room_of(entry) is room for entry in entries)]
        for room in rooms:
            needed = self._rows_in(room, entries)
            if not room.could_hold(needed):
                raise InvalidArgument(f"the request needs {room.refusal(needed)}", field="adapter")
        waiter = _Waiter(entries=entries, rooms=rooms, turn=asyncio.get_running_loop().create_future())
        for room in rooms:
            room.line[waiter] = None
        for entry in entries:
            entry.waiters[waiter] = None
        return waiter

    def _leave_line(self, waiter: _Waiter) -> None:
        for room in waiter.rooms:
            del room.line[waiter]
        for entry in waiter.entries:
            del entry.waiters[waiter]

    def _give_turns(self) -> None:
        """Let waiters in, in order, as far as there is room; idle adapters make room."""
        while turns := [turn for room in self._rooms if (turn := self._find_turn(room))]:
            waiter, leavers = turns[0]
            for entry in leavers:
                self._drop_resident(entry)
            self._let_in(waiter)

    def _find_turn(self, room: Room[_Waiter]) -> tuple[_Waiter, list[_Entry]] | None:
        """The first in line, where it can come in, and the idle adapters that must leave before."""
        waiter = room.first
        if waiter is None or any(other.first is not waiter for other in waiter.rooms):
            return None
        missing = [entry for entry in waiter.entries if not entry.is_resident]
        wanted = {entry.digest for entry in waiter.entries}
        leavers: list[_Entry] = []
        for each in waiter.rooms:
            digests = each.find_leavers(self._rows_in(each, missing), wanted)
            if digests is None:
                return None
            leavers += [self._entries[digest] for digest in digests]
        return waiter, leavers

    def _let_in(self, waiter: _Waiter) -> None:
        """Load what a waiter lacks; it holds what it waited for, and so does who now has all of theirs."""
        missing = [entry for entry in waiter.entries if not entry.is_resident]
        self._leave_line(waiter)
        try:
            for entry in missing:
                self._load_into_room(entry)
        except Exception as error:
            waiter.turn.set_exception(error)
        else:
            self._hold(waiter.entries)
            waiter.turn.set_result(None)
        # These take no room, so they are before nobody.
        for other in [one for entry in missing for one in entry.waiters if _are_resident(one.entries)]:
            if not other.turn.done():
                self._leave_line(other)
                self._hold(other.entries)
                other.turn.set_result(None)

    def _load_into_room(self, entry: _Entry) -> None:
        self._load(entry.adapter)
        entry.is_resident = True
        self._device_bytes += entry.adapter.size_bytes
        self._room_of(entry).take(entry.digest, entry.num_rows)

    def _drop_resident(self, entry: _Entry) -> None:
        entry.is_resident = False
        self._device_bytes -= entry.adapter.size_bytes
        self._room_of(entry).give_back(entry.digest)
        if not entry.num_asking:
            del self._entries[entry.digest]
        self._drop(entry.digest)

    def _room_of(self, entry: _Entry) -> Room[_Waiter]:
        return self._loras if entry.adapter.is_lora else self._soft_prompts

    def _rows_in(self, room: Room[_Waiter], entries: Iterable[_Entry]) -> Mapping[str, int]:
        return {entry.digest: entry.num_rows for entry in entries if self._room_of(entry) is room}

    def _find_resident(self, digest: str) -> Resident | None:
        """An adapter that is in memory."""
        entry = self._entries.get(digest)
        if entry is not None and entry.is_resident:
            return self._describe(entry.adapter, "device", entry.num_using)
        adapter = self._host_cache.peek(digest)
        return self._describe(adapter, "host", 0) if adapter else None

    def _describe(self, adapter: Adapter, tier: Literal["host", "device"], users: int) -> Resident:
        usage = self._usage.get(adapter.digest, _Usage())
        idle_s = 0.0 if users or usage.released_s is None else monotonic() - usage.released_s
        return Resident(adapter=adapter, tier=tier, idle_s=idle_s, hits=usage.hits, users=users)


def _are_resident(entries: Iterable[_Entry]) -> bool:
    return all(entry.is_resident for entry in entries)
