"""The stream of changes: what Watch reads, from any cursor that is still kept."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis.exceptions
import structlog
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from softprompt_api.errors import CursorExpired, InvalidArgument

from softprompt_registry import keys
from softprompt_registry.catalog import EventType
from softprompt_registry.connection import reads, reply
from softprompt_registry.full import also_when_full

_log = structlog.get_logger()
MAX_KEPT_EVENTS = 10_000
_BATCH = 100
_START = "0-0"
_BEYOND = 2**64  # the store takes no such numbers
Position = tuple[int, int]
_CURSOR = re.compile(r"(\d{1,20})-(\d{1,20})\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change.

    Attributes:
        cursor: watch from here to get what came after it.
        name: of the adapter; for KEY_CREATED and KEY_REVOKED, the sha256 of the key.
        id: global id of the version, for REGISTERED, ALIAS_SET and UPDATED.
        version, digest: of the version, for VERSION_DELETED.
        alias: for ALIAS_SET and ALIAS_REMOVED; for VERSION_DELETED, `latest` where it pointed to the version.
    """

    cursor: str
    type: EventType
    name: str
    id: int
    version: int
    digest: str
    alias: str


def append(
    transaction: Pipeline,
    type_: EventType,
    *,
    name: str,
    id_: int = 0,
    version: int = 0,
    digest: str = "",
    alias: str = "",
) -> None:
    """Queue an event into a transaction."""
    fields = ["type", type_.value, "name", name, "id", id_, "version", version, "digest", digest]
    if alias:
        fields += ["alias", alias]
    also_when_full(transaction, "XADD", keys.EVENTS, "MAXLEN", "~", MAX_KEPT_EVENTS, "*", *fields)


class EventLog:
    """Read the stream of changes.

    Args:
        client: for short commands.
        watch_client: for waiting ones; its timeout must be longer than any wait.
    """

    def __init__(self, client: Redis, watch_client: Redis) -> None:
        self._client = client
        self._watch_client = watch_client

    async def position(self) -> str:
        """The cursor after the newest change."""
        return (await self._state()).last

    async def check(self, cursor: str) -> None:
        """Raise InvalidArgument for what is no cursor, CursorExpired when changes after it are lost."""
        asked = position_of(cursor)
        if max(asked) < _BEYOND and await self._is_kept(cursor):
            return
        state = await self._state()
        if state.is_trimmed and asked < position_of(state.first):
            raise CursorExpired("changes after the cursor are not kept any more; list again and watch from there")
        if asked != position_of(_START):
            # Of another store, or of this one before it was restored from a backup.
            raise CursorExpired("the cursor is not of this store; list again and watch from there")

    @reads
    async def after(self, cursor: str, *, wait_s: float) -> list[Event]:
        """Changes after a cursor, oldest first; waits for the first one, and returns [] when the time is over.

        Raises:
            CursorExpired: one of them cannot be read; nobody may believe to have been told of it.
        """
        answer: Any = await self._watch_client.xread(
            {keys.EVENTS: cursor}, count=_BATCH, block=max(1, int(wait_s * 1000))
        )
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer or ()]
        return [_read(entry_id, fields) for entries in streams for entry_id, fields in _flat(entries)]

    @reads
    async def _is_kept(self, cursor: str) -> bool:
        return bool(await reply(self._client.xrange(keys.EVENTS, cursor, cursor)))

    @reads
    async def _state(self) -> "_State":
        try:
            info: Mapping[str, Any] = await self._client.xinfo_stream(keys.EVENTS)
        except redis.exceptions.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return _State(first=_START, last=_START, is_trimmed=False)
        first = info["first-entry"]
        return _State(
            first=first[0].decode() if first else _START,
            last=info["last-generated-id"].decode(),
            is_trimmed=info["entries-added"] > info["length"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    first: str
    last: str
    is_trimmed: bool


def _flat(entries: Any) -> Any:
    """RESP3 wraps a stream's entries in one more list."""
    return entries[0] if entries and isinstance(entries[0], list) else entries


def _read(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Event:
    try:
        return _decode(entry_id, fields)
    except (KeyError, ValueError) as error:
        _log.error("a stored change is damaged; watchers list again", id=repr(entry_id), cause=repr(error))
        raise CursorExpired("a change after the cursor cannot be read; list again and watch from there") from error


def _decode(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Event:
    version = int(fields[b"version"])
    if not 0 <= version < 2**31:  # as many as a message can tell
        raise ValueError("the number is no version's")
    return Event(
        cursor=entry_id.decode(),
        type=EventType(fields[b"type"].decode()),
        name=fields[b"name"].decode(),
        id=int(fields[b"id"]),
        version=version,
        digest=fields[b"digest"].decode(),
        alias=fields.get(b"alias", b"").decode(),
    )


def position_of(cursor: str) -> Position:
    """Where a cursor stands among others; InvalidArgument for what is none."""
    match = _CURSOR.match(cursor)
    if match is None:
        raise InvalidArgument("this is not a cursor of the registry", field="cursor")
    return int(match[1]), int(match[2])
