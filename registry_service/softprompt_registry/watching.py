"""Watch: every change after a cursor, heartbeats in between, until the client leaves or the registry stops."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from softprompt_api.errors import DataCorrupted, Overloaded, Unavailable

from softprompt_registry.api_keys import ApiKey
from softprompt_registry.catalog import AdapterVersion, EventType
from softprompt_registry.events import Event, EventLog
from softprompt_registry.key_store import KeyStore
from softprompt_registry.store import Store

_TOLD_WHOLE = (EventType.REGISTERED, EventType.ALIAS_SET, EventType.UPDATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a watcher is told.

    Attributes:
        cursor: watch from here to continue.
        event: what happened; None: nothing, the stream is alive.
        version: the whole version, for REGISTERED, ALIAS_SET and UPDATED.
        key: the whole key, for KEY_CREATED.
    """

    cursor: str
    event: Event | None = None
    version: AdapterVersion | None = None
    key: ApiKey | None = None


class Watching:
    """Serve watchers, a bounded number of them."""

    def __init__(
        self, store: Store, keys: KeyStore, events: EventLog, *, heartbeat_s: float, max_watchers: int
    ) -> None:
        self._store = store
        self._keys = keys
        self._events = events
        self._heartbeat_s = heartbeat_s
        self._max_watchers = max_watchers
        self._num_watchers = 0
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End every watch with Unavailable, so that the watchers turn elsewhere."""
        self._stopping.set()

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
                for event in events:
                    if change := await self._change(event):
                        yield change
                    cursor = event.cursor
                if not events:
                    yield Change(cursor=cursor)
        finally:
            self._num_watchers -= 1

    async def _next(self, cursor: str) -> list[Event]:
        reading = asyncio.create_task(self._events.after(cursor, wait_s=self._heartbeat_s))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise Unavailable("the registry is stopping")
            events = reading.result()
        finally:
            reading.cancel()
            stopping.cancel()
        if events:  # the stream may have lost some just before the first of them
            await self._events.check(cursor)
        return events

    async def _change(self, event: Event) -> Change | None:
        """What to tell of an event; None: its subject was deleted since, and the event that says so follows."""
        version, key = None, None
        try:
            if event.type in _TOLD_WHOLE:
                version = await self._store.find_id(event.id)
            elif event.type is EventType.KEY_CREATED:
                key = await self._keys.find(event.name)
            else:
                return Change(cursor=event.cursor, event=event)
        except DataCorrupted:  # whoever asks for it is told; watchers must get past it
            return None
        is_there = version is not None or key is not None
        return Change(cursor=event.cursor, event=event, version=version, key=key) if is_there else None
