"""Which adapters the engine holds: brought in when first asked for, kept while used, dropped only when idle.

asked for ──▶ fetching (one task per digest) ──▶ waiting for room ──▶ resident, in use ◀──▶ resident, idle
                                                                                                │ room needed
                                                                                                ▼
                                                                                             dropped

A request that needs several adapters gets all of them at once or waits for all of them, and holds none while it
waits: two requests can never wait for each other. So it must ask for none while it holds some.

There is one line, in which tenants take turns. Where too many in it wait for a room, for the pace at which they
come in, newcomers are told to come back.

Whoever waits for room holds no memory either, but for those who are next: their adapters are in hand. Others find
theirs in the host cache when it is their turn, or have them fetched again.
"""

import asyncio
import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from time import monotonic
from typing import Literal

from softprompt_api.errors import AdapterInUse, AdapterLoading, InvalidArgument, Overloaded, Unavailable
from softprompt_api.tracing import span
from softprompt_api.waiting import hear_error, wait_for_shared

from softprompt_inference.adapters.adapter import Adapter, AdapterInfo
from softprompt_inference.adapters.entry import Entry, Waiter
from softprompt_inference.adapters.fetching import MAX_FETCHES, Fetch, Fetches
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.room import Room
from softprompt_inference.pace import Pace
from softprompt_inference.turns import Places, line_up

_MAX_REMEMBERED = 65_536
# Users of what is resident come without a break: from then on they wait behind who waits for room alone.
_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """An adapter in memory, and how it is used.

    Attributes:
        tier: the fastest one that holds it.
        idle_s: since the last request let it go; 0 while it is used or was never asked for.
        hits: requests that asked for it, as far as is remembered.
        users: requests that use it now.
        is_pinned: whether it stays on the device until it is evicted.
    """

    adapter: AdapterInfo
    tier: Literal["host", "device"]
    idle_s: float
    hits: int
    users: int
    is_pinned: bool


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
    asked: int = 0  # the number of the request that asked last, of all requests
    released_s: float | None = None


class Residency:
    """Brings adapters in on demand and holds those in use; belongs to one event loop.

    Requests for one digest share one fetch. When everything resident is in use, requests for further adapters wait
    their turn; those whose adapters are all resident wait only where the next has waited too long, and lacks
    nothing but room. Soft prompts and LoRAs have room of their own: a request has its turn when nobody before it
    needs a room that it needs. A failed fetch is the failure of those who wait for it, and is tried anew by the
    next request; so is what the engine failed to load.

    Args:
        fetch: gets a verified adapter by digest; see `Fetches`.
        load: tells the engine to take an adapter; ordered before later commands.
        drop: tells the engine to forget a digest.
        max_adapters: most soft prompts in the engine, and as many of those that are keys and values.
        max_rows: most virtual tokens in the engine that are embeddings; no adapter has more.
        max_key_value_rows: most that are keys and values.
        max_loras: most LoRAs in the engine.
        host_cache: adapters kept in host memory.
        max_wait_s: longest wait for room, as far as it can be foretold.
        now: seconds.
    """

    def __init__(
        self,
        *,
        fetch: Fetch,
        load: Callable[[Adapter], None],
        drop: Callable[[str], None],
        max_adapters: int,
        max_rows: int,
        max_key_value_rows: int,
        max_loras: int,
        host_cache: HostCache,
        max_wait_s: float = math.inf,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._load = load
        self._drop = drop

        def make_room(sort: str, settings: str, max_adapters: int, max_rows: int = 0) -> Room:
            pace = Pace(max_wait_s=max_wait_s, refusal=AdapterLoading, now=now)
            return Room(sort=sort, settings=settings, max_adapters=max_adapters, max_rows=max_rows, pace=pace)

        self._soft_prompts = make_room(
            "soft prompts", "max_prompt_adapters, max_adapter_rows", max_adapters, max_rows
        )
        self._key_values = make_room(
            "soft prompts of keys and values",
            "max_prompt_adapters, max_key_value_bytes",
            max_adapters,
            max_key_value_rows,
        )
        self._loras = make_room("LoRAs", "max_loras", max_loras)
        self._rooms = (self._soft_prompts, self._key_values, self._loras)
        self._line: list[Waiter] = []  # for all rooms: two who need the same two are never each before the other
        self._host_cache = host_cache
        self._entries: dict[str, Entry] = {}
        self._usage: OrderedDict[str, _Usage] = OrderedDict()  # of adapters asked for lately, the last one last
        self._hits: Counter[str] = Counter()  # requests by where their adapter was
        self._now = now
        self._fetches = Fetches(fetch)
        # They are not held up by all who came later.
        self._fetches_of_next = {room: Places(1) for room in self._rooms}
        self._num_waiting = 0

    @asynccontextmanager
    async def use(
        self,
        *digests: str,
        tenant: str = "",
        num: int = 1,
        check: Callable[[Sequence[AdapterInfo]], object] | None = None,
    ) -> AsyncIterator[Sequence[AdapterInfo]]:
        """Hold adapters in the engine for the time of the context; waits until all of them are there.

        Args:
            tenant: whose request it is.
            num: completions that they are for.
            check: looks at them before they take room; what it raises ends the wait.

        Raises InvalidArgument where they do not fit the device together, even alone; Overloaded where the wait for
        room would be too long.
        """
        entries = {digest: self._ask_for(digest, tenant) for digest in dict.fromkeys(digests)}
        try:
            with span("adapters"), self._waiting(num):
                adapters = [await self._fetched(entries[digest]) for digest in digests]
                if check is not None:
                    check(adapters)
                await self._hold_in_turn(list(entries.values()), tenant)
            try:
                yield adapters
            finally:
                self._let_go(entries.values())
        finally:
            for entry in entries.values():
                self._forget(entry)

    @property
    def num_waiting(self) -> int:
        """Completions whose adapters are on their way, or in line."""
        return self._num_waiting

    @contextmanager
    def _waiting(self, num: int) -> Iterator[None]:
        self._num_waiting += num
        try:
            yield
        finally:
            self._num_waiting -= num

    def resident(self, limit: int | None = None) -> list[Resident]:
        """What is in memory, the most recently used first; no more than `limit`."""
        held = dict.fromkeys(chain(self._entries, self._host_cache.digests()))
        latest_first = sorted(held, key=self._last_asked, reverse=True)
        return list(islice(filter(None, map(self._find_resident, latest_first)), limit))

    def _last_asked(self, digest: str) -> int:
        usage = self._usage.get(digest)
        return usage.asked if usage else 0

    @property
    def num_resident(self) -> int:
        """How many adapters are in memory."""
        return len(self._host_cache) + sum(info.digest not in self._host_cache for info in self._on_device())

    def tiers(self) -> list[Tier]:
        """What each tier holds, the fastest first."""
        on_device = self._on_device()
        device = Tier(
            name="device",
            num_adapters=len(on_device),
            size_bytes=sum(info.size_bytes for info in on_device),
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
        loras = [entry for entry in self._entries.values() if entry.found and entry.info.is_lora]
        running = {entry.info.name for entry in loras if entry.num_using}
        waiting = {entry.info.name for entry in loras if entry.num_asking > entry.num_using}
        return sorted(running), sorted(waiting)

    def pin(self, digest: str) -> None:
        """Have an adapter that is in use stay on the device until it is evicted.

        Raises:
            Overloaded: so many are pinned that there would be no room for others.
        """
        entry = self._entries[digest]
        assert entry.num_using
        room = self._room_of(entry)
        room.pin(digest, entry.num_rows)
        for waiter in [waiter for waiter in self._line if room in waiter.rooms]:
            needed = self._rows_in(room, waiter.entries)
            if not room.could_hold(needed):  # it did when it came
                self._leave_line(waiter)
                waiter.turn.set_exception(_never_fits(room, needed))
        self._give_turns()

    def evict(self, digest: str) -> bool:
        """Let an adapter go from all memory, also one that is pinned; False when it is not there.

        Raises:
            AdapterInUse: requests use it, or wait for it. It is not pinned any more.
        """
        entry = self._entries.get(digest)
        if entry is None:
            return self._host_cache.discard(digest)
        if entry.is_resident:
            self._room_of(entry).pinned.pop(digest, None)
        is_asked_for = entry.num_asking > 0
        if not is_asked_for:
            self._host_cache.discard(digest)
            self._drop_resident(entry)
        self._give_turns()
        if is_asked_for:
            raise AdapterInUse("requests use the adapter; it can go when they have ended", field="adapter")
        return True

    def load_failed(self, digest: str) -> None:
        """The engine could not take an adapter: whoever asks for it next has it tried again."""
        entry = self._entries.get(digest)
        if entry is not None and entry.is_resident:
            entry.has_failed = True
            self._give_turns()

    async def close(self) -> None:
        """Stop bringing adapters in."""
        tasks = [entry.fetching for entry in self._entries.values() if entry.fetching is not None]
        for task in tasks:
            task.cancel()
        for waiter in list(self._line):
            self._leave_line(waiter)
            waiter.turn.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def refuse(self) -> None:
        """End the wait of all who are in line for room: the engine has ended."""
        for waiter in list(self._line):
            self._leave_line(waiter)
            waiter.turn.set_exception(Unavailable("the engine has ended; try again"))

    def check(self) -> None:
        """Assert that the counters agree with the entries, and that nobody waits, or has memory, without need."""
        for entry in self._entries.values():
            assert 0 <= entry.num_using <= entry.num_asking
            assert entry.is_resident or (entry.num_asking and not entry.num_using and not entry.has_failed)
        closed = self._closed()
        for room in self._rooms:
            held = [one for one in self._entries.values() if one.is_resident and self._room_of(one) is room]
            assert (len(held), sum(one.num_rows for one in held)) == (room.num_adapters, room.num_rows)
            assert dict(room.idle) == {one.digest: one.num_rows for one in held if not one.num_using}
            assert room.num_waiting == sum(room in waiter.rooms for waiter in self._line)
            room.check()
            assert room.pinned.items() <= {one.digest: one.num_rows for one in held}.items()
        assert not any(_may_pass(waiter, closed) for waiter in self._line), "they wait for what is there"
        in_hand, wanted = set(self._host_cache.in_hand()), self._wanted_next()
        for waiter in self._next():
            missing = {entry.digest for entry in waiter.missing}
            assert not missing <= in_hand or self._find_leavers(waiter) is None, "there is room and somebody waits"
            assert all(entry.is_coming for entry in waiter.missing if entry.digest not in in_hand)
        assert len(in_hand - wanted) <= MAX_FETCHES
        assert all(self._entries[digest].num_asking for digest in in_hand)
        assert not any(self._entries[digest].is_ready for digest in in_hand)
        self._host_cache.check()

    def _on_device(self) -> list[AdapterInfo]:
        return [entry.info for entry in self._entries.values() if entry.is_ready]

    def _ask_for(self, digest: str, tenant: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = Entry(digest=digest, tenant=tenant)
            if adapter := self._host_cache.get(digest):
                entry.found = adapter.info
            else:
                self._begin_fetch(entry)
        self._hits["device" if entry.is_ready else "host" if digest in self._host_cache else "registry"] += 1
        entry.num_asking += 1
        usage = self._usage.setdefault(digest, _Usage())
        usage.hits += 1
        usage.asked = self._hits.total()
        self._usage.move_to_end(digest)
        if len(self._usage) > _MAX_REMEMBERED:
            self._usage.popitem(last=False)
        return entry

    def _begin_fetch(self, entry: Entry) -> None:
        entry.fetching = asyncio.create_task(self._bring(entry), name=f"fetch {entry.digest}")
        hear_error(entry.fetching)  # those in line are told by `_give_up`

    async def _bring(self, entry: Entry) -> None:
        try:
            if entry.found is None:
                adapter = await self._fetches.fetch(entry.digest, entry.tenant)
            else:
                async with self._fetches_of_next[self._room_of(entry)].taken(entry.tenant):
                    adapter = await self._fetches.fetch_at_once(entry.digest)
        except BaseException as error:
            self._give_up(entry, error)
            raise
        entry.found = adapter.info
        self._host_cache.put(adapter)
        if entry.num_asking:
            self._host_cache.hold(adapter)
        self._give_turns()

    def _give_up(self, entry: Entry, error: BaseException) -> None:
        """Let a failed fetch be the failure of those who are in line for it."""
        if entry.found is None and self._entries.get(entry.digest) is entry:
            del self._entries[entry.digest]
        for waiter in list(entry.waiters):
            self._leave_line(waiter)
            waiter.turn.set_exception(error)
        self._give_turns()

    async def _fetched(self, entry: Entry) -> AdapterInfo:
        if entry.found is None:
            assert entry.fetching is not None
            await wait_for_shared(entry.fetching)
        return entry.info

    def _forget(self, entry: Entry) -> None:
        """One request less asks for it."""
        entry.num_asking -= 1
        if usage := self._usage.get(entry.digest):
            usage.released_s = self._now()
        if entry.num_asking or self._entries.get(entry.digest) is not entry:
            return
        self._host_cache.let_go(entry.digest)
        if entry.is_resident:
            return
        del self._entries[entry.digest]
        if entry.fetching is not None:
            entry.fetching.cancel()

    async def _hold_in_turn(self, entries: Sequence[Entry], tenant: str) -> None:
        """Keep adapters in the engine, from when it has all of them, or it is their turn to come in together."""
        waiter = self._make_waiter(entries, tenant)
        if _may_pass(waiter, self._closed()):
            self._hold(entries)
            return
        self._line_up(waiter)
        self._give_turns()
        for room in waiter.rooms:  # who came in at once has not waited
            room.measure()
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

    def _hold(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.num_using += 1
            self._room_of(entry).idle.pop(entry.digest, None)

    def _let_go(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.num_using -= 1
            if not entry.num_using:
                self._room_of(entry).idle[entry.digest] = entry.num_rows
        self._give_turns()

    def _make_waiter(self, entries: Sequence[Entry], tenant: str) -> Waiter:
        rooms = [room for room in self._rooms if any(self._room_of(entry) is room for entry in entries)]
        for room in rooms:
            needed = self._rows_in(room, entries)
            if not room.could_hold(needed):
                raise _never_fits(room, needed)
        turn = asyncio.get_running_loop().create_future()
        return Waiter(
            tenant=tenant,
            entries=entries,
            rooms=rooms,
            turn=turn,
            since_s=self._now(),
            is_short=not all(entry.is_ready for entry in entries),
        )

    def _line_up(self, waiter: Waiter) -> None:
        """Put a request in line; Overloaded where it would wait too long for what is not there."""
        line_up(self._line, waiter)
        for entry in waiter.entries:
            entry.waiters[waiter] = None
        for room in waiter.rooms:
            room.measure()
            room.num_waiting += 1
        if not waiter.is_short:
            return
        # Those who were not, and wait for who is next alone, come and go at another pace.
        before = [other for other in self._line[: self._line.index(waiter)] if other.is_short]
        try:
            for room in waiter.rooms:
                room.pace.check(sum(room in other.rooms for other in before))
        except Overloaded:
            self._leave_line(waiter)
            raise

    def _leave_line(self, waiter: Waiter, *, comes_in: bool = False) -> None:
        self._line.remove(waiter)
        for entry in waiter.entries:
            del entry.waiters[waiter]
        for room in waiter.rooms:
            room.num_waiting -= 1
            room.measure(int(comes_in and waiter.is_short))

    def _give_turns(self) -> None:
        """Let waiters in, in order, as far as there is room; idle adapters make room."""
        while self._let_pass() or self._let_next_in():
            pass
        self._host_cache.let_go_but(self._wanted_next(), num_others=MAX_FETCHES)

    def _closed(self) -> set[Room]:
        """Rooms that nobody enters any more before the next, which has waited too long and lacks nothing else."""
        earliest_s = self._now() - _PATIENCE_S
        return {
            room
            for waiter in self._next()
            if waiter.since_s < earliest_s and all(entry.digest in self._host_cache for entry in waiter.missing)
            for room in waiter.rooms
        }

    def _let_pass(self) -> bool:
        """Let in all who need not wait; whether there were any."""
        closed = self._closed()
        passing = [waiter for waiter in self._line if _may_pass(waiter, closed)]
        for waiter in passing:
            self._leave_line(waiter, comes_in=True)
            self._hold(waiter.entries)
            waiter.turn.set_result(None)
        return bool(passing)

    def _next(self) -> list[Waiter]:
        """Those who come in as soon as there is room: nobody before them needs a room that they need."""
        needed = [room for room in self._rooms if room.num_waiting]
        found: list[Waiter] = []
        for waiter in self._line:
            if not needed:
                break
            if all(room in needed for room in waiter.rooms):
                found.append(waiter)
            needed = [room for room in needed if room not in waiter.rooms]
        return found

    def _wanted_next(self) -> set[str]:
        return {entry.digest for waiter in self._next() for entry in waiter.missing}

    def _let_next_in(self) -> bool:
        """Let in one who is next, if one can come in; what they lack in host memory is fetched."""
        for waiter in self._next():
            if not self._are_in_hand(waiter.missing):
                continue
            leavers = self._find_leavers(waiter)
            if leavers is not None:
                for entry in leavers:
                    self._drop_resident(entry)
                self._let_in(waiter)
                return True
        return False

    def _are_in_hand(self, entries: Sequence[Entry]) -> bool:
        """Whether adapters can be loaded now; those that cannot are on their way."""
        lacking = [entry for entry in entries if not self._host_cache.take_up(entry.digest)]
        for entry in lacking:
            if not entry.is_coming:
                self._begin_fetch(entry)
        return not lacking

    def _find_leavers(self, waiter: Waiter) -> list[Entry] | None:
        """The idle adapters that must leave before a waiter can come in; None: it cannot even then."""
        newcomers = [entry for entry in waiter.entries if not entry.is_resident]
        wanted = {entry.digest for entry in waiter.entries}
        leavers: list[Entry] = []
        for room in waiter.rooms:
            digests = room.find_leavers(self._rows_in(room, newcomers), wanted)
            if digests is None:
                return None
            leavers += [self._entries[digest] for digest in digests]
        return leavers

    def _let_in(self, waiter: Waiter) -> None:
        """Load what a waiter lacks; it holds what it waited for."""
        self._leave_line(waiter, comes_in=True)
        try:
            for entry in waiter.missing:
                self._load_into_room(entry)
        except Exception as error:
            waiter.turn.set_exception(error)
        else:
            self._hold(waiter.entries)
            waiter.turn.set_result(None)

    def _load_into_room(self, entry: Entry) -> None:
        self._load(self._host_cache.hand_out(entry.digest))
        entry.has_failed = False
        if not entry.is_resident:
            entry.is_resident = True
            self._room_of(entry).take(entry.digest, entry.num_rows)

    def _drop_resident(self, entry: Entry) -> None:
        entry.is_resident = entry.has_failed = False
        self._room_of(entry).give_back(entry.digest)
        if not entry.num_asking:
            del self._entries[entry.digest]
        self._drop(entry.digest)

    def _room_of(self, entry: Entry) -> Room:
        if entry.info.is_lora:
            return self._loras
        return self._key_values if entry.info.are_key_values else self._soft_prompts

    def _rows_in(self, room: Room, entries: Iterable[Entry]) -> Mapping[str, int]:
        return {entry.digest: entry.num_rows for entry in entries if self._room_of(entry) is room}

    def _find_resident(self, digest: str) -> Resident | None:
        """An adapter that is in memory."""
        entry = self._entries.get(digest)
        if entry is not None and entry.is_ready:
            return self._describe(entry.info, "device", entry.num_using)
        adapter = self._host_cache.peek(digest)
        return self._describe(adapter.info, "host", 0) if adapter else None

    def _describe(self, adapter: AdapterInfo, tier: Literal["host", "device"], users: int) -> Resident:
        usage = self._usage.get(adapter.digest, _Usage())
        idle_s = 0.0 if users or usage.released_s is None else self._now() - usage.released_s
        is_pinned = any(adapter.digest in room.pinned for room in self._rooms)
        return Resident(
            adapter=adapter, tier=tier, idle_s=idle_s, hits=usage.hits, users=users, is_pinned=is_pinned
        )


def _may_pass(waiter: Waiter, closed: set[Room]) -> bool:
    """Whether a request takes no room, so that it is before nobody, and needs no room that is closed."""
    return closed.isdisjoint(waiter.rooms) and not waiter.missing


def _never_fits(room: Room, needed: Mapping[str, int]) -> InvalidArgument:
    return InvalidArgument(f"the request needs {room.refusal(needed)}", field="adapter")
