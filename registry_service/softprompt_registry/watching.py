"""Watch: every change after a cursor, heartbeats in between, until the client leaves or the registry stops."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from softprompt_api.errors import DataCorrupted, Overloaded

from softprompt_registry.api_keys import ApiKey
from softprompt_registry.catalog import AdapterVersion, EventType
from softprompt_registry.events import Event, EventLog
from softprompt_registry.key_store import KeyStore
from softprompt_registry.stopping import Stopping
from softprompt_registry.store import Store

_TOLD_WHOLE = (EventType.REGISTERED, EventType.ALIAS_SET, EventType.UPDATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a watcher is told.

    Attributes:
        cursor: watch from here to continue.
        event: what happened; None: nothing, the stream is alive.
        version: the whole version, for REGISTERED, ALIAS_SET and UPDATED; None where it cannot be read or has been
            deleted since: watchers must not go on with what they know.
        key: the whole key, for KEY_CREATED.
    """

    cursor: str
    event: Event | None = None
    version: AdapterVersion | None = None
    key: ApiKey | None = None


class Watching:
    """Serve watchers, a bounded number of them, until the registry stops."""

    def __init__(
        self,
        store: Store,
        keys: KeyStore,
        events: EventLog,
        stopping: Stopping,
        *,
        heartbeat_s: float,
        max_watchers: int,
    ) -> None:
        self._store = store
        self._keys = keys
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._max_watchers = max_watchers
        self._stopping = stopping
        self._num_watchers = 0

    async def watch(self, cursor: str) -> AsyncIterator[Change]:
        """Changes after a cursor ("": from now on), beginning with a heartbeat.

        Raises:
            CursorExpired: changes after the cursor are lost, now or because the watcher was too slow.
            Unavailable: the registry stops, or the store is away.
        """
        if self._num_watchers >= self._max_watchers:
            raise Overloaded(f"{self._num_watchers} watchers are connected, as many as are allowed")
        self._num_watchers += 1
        try:
            if cursor:
                await self._events.check(cursor)
            else:
                cursor = await self._events.position()
            yield Change(cursor=cursor)
            while True:
                events = await self._next(cursor)
                for change in await self._tell(events):
                    yield change
                if events:
                    cursor = events[-1].cursor
                else:
                    yield Change(cursor=cursor)
        finally:
            self._num_watchers -= 1

    async def _next(self, cursor: str) -> list[Event]:
        events = await self._stopping.or_else(self._events.after(cursor, wait_s=self._heartbeat_s))
        if events:  # the stream may have lost some just before the first of them
            await self._events.check(cursor)
        return events

    async def _tell(self, events: Sequence[Event]) -> list[Change]:
        """What is said of events; the versions of all of them are asked for at once."""
        over = _over(events)
        told_whole = [event for event in events if event.type in _TOLD_WHOLE and event.cursor not in over]
        found = await self._store.find_ids([event.id for event in told_whole]) if told_whole else []
        versions = {event.cursor: version for event, version in zip(told_whole, found, strict=True)}
        created = [event for event in events if event.type is EventType.KEY_CREATED]
        keys = {event.cursor: await self._key(event) for event in created}
        # Without what a later one of these events says to be deleted, and keys that are revoked or cannot be read.
        untold = over | {cursor for cursor, key in keys.items() if key is None}
        return [
            Change(
                cursor=event.cursor, event=event, version=versions.get(event.cursor), key=keys.get(event.cursor)
            )
            for event in events
            if event.cursor not in untold
        ]

    async def _key(self, event: Event) -> ApiKey | None:
        try:
            return await self._keys.find(event.name)
        except DataCorrupted:  # whoever asks for it is told; watchers must get past it
            return None


def _over(events: Sequence[Event]) -> set[str]:
    """The cursors of events about versions whose deletion stands further down among these."""
    over, gone = set(), set[tuple[str, int]]()
    for event in reversed(events):
        if event.type is EventType.VERSION_DELETED:
            gone.add((event.name, event.version))
        elif event.type is EventType.ADAPTER_DELETED:
            gone.add((event.name, 0))
        elif event.type in _TOLD_WHOLE and gone & {(event.name, event.version), (event.name, 0)}:
            over.add(event.cursor)
    return over
