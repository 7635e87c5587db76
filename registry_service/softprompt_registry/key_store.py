"""API keys in the store: made and revoked in one transaction each, with the event that tells gateways."""

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from softprompt_api.access import key_sha256, new_key
from softprompt_api.errors import DataCorrupted, InvalidArgument, KeyNotFound
from softprompt_api.names import shown

from softprompt_registry import events, keys
from softprompt_registry.api_keys import (
    SHA256_PATTERN,
    ApiKey,
    KeyDraft,
    decode_key,
    encode_key,
    id_digits,
    made_now,
)
from softprompt_registry.catalog import EventType
from softprompt_registry.connection import reads, reply, writes
from softprompt_registry.pages import read_page

_log = structlog.get_logger()
_QUERY = "keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPage:
    """One page of keys; `next_token` is "" on the last.

    Attributes:
        ever_made: whether a key was ever made.
    """

    keys: Sequence[ApiKey]
    next_token: str
    ever_made: bool


class KeyStore:
    """Make, find, list and revoke API keys."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def create(self, draft: KeyDraft) -> tuple[str, ApiKey]:
        """A new key's text, which is kept nowhere, and what is kept of it."""
        text = new_key()
        key = made_now(draft, sha256=key_sha256(text))
        await self._put(key)
        return text, key

    @writes
    async def _put(self, key: ApiKey) -> None:
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(keys.api_key(key.sha256), mapping=encode_key(key))
            pipe.zadd(keys.API_KEYS, {key.sha256: 0})
            pipe.incr(keys.NUM_KEYS_MADE)
            events.append(pipe, EventType.KEY_CREATED, name=key.sha256)
            await pipe.execute()

    @reads
    async def find(self, sha256: str) -> ApiKey | None:
        """The key with this sha256; None when there is none."""
        if not SHA256_PATTERN.match(sha256):
            raise InvalidArgument("sha256 must be 64 lower-case hex digits", field="sha256")
        fields = await reply(self._client.hgetall(keys.api_key(sha256)))
        return decode_key(fields, sha256=sha256) if fields else None

    @reads
    async def page(self, *, size: int, token: str) -> KeyPage:
        """One page of the keys, in order of ids; what cannot be read is left out."""
        page = await read_page(self._after, query=_QUERY, size=size, token=token)
        ever_made = bool(await reply(self._client.exists(keys.NUM_KEYS_MADE)))
        return KeyPage(keys=page.items, next_token=page.next_token, ever_made=ever_made)

    async def _after(self, after: str, limit: int) -> list[tuple[str, ApiKey | None]]:
        low = f"({after}" if after else "-"
        found = await reply(self._client.zrangebylex(keys.API_KEYS, low, "+", start=0, num=limit))
        names = [sha256.decode() for sha256 in found]
        pipe = self._client.pipeline(transaction=False)
        for sha256 in names:
            pipe.hgetall(keys.api_key(sha256))
        records = await pipe.execute()
        return [(sha256, _readable(sha256, fields)) for sha256, fields in zip(names, records, strict=True)]

    @writes
    async def revoke(self, id_: str) -> str:
        """Delete a key, also one whose record is damaged; its sha256. KeyNotFound: there is none with this id."""
        digits = id_digits(id_)
        found = await reply(self._client.zrangebylex(keys.API_KEYS, f"[{digits}", f"[{digits}g", start=0, num=1))
        if not found:
            raise KeyNotFound(f"there is no API key {shown(id_)}", field="id")
        sha256: str = found[0].decode()
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.unlink(keys.api_key(sha256))
            pipe.zrem(keys.API_KEYS, sha256)
            events.append(pipe, EventType.KEY_REVOKED, name=sha256)
            await pipe.execute()
        return sha256


def _readable(sha256: str, fields: dict[bytes, bytes]) -> ApiKey | None:
    try:
        return decode_key(fields, sha256=sha256) if fields else None
    except DataCorrupted:
        _log.error("a stored API key is damaged and left out of lists", key=sha256[:12])
        return None
