"""Versions as they come and go: one transaction each, all or nothing."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from softprompt_api.errors import DataCorrupted, Unavailable
from softprompt_api.names import LATEST

from softprompt_registry import catalog, events, keys, pointers
from softprompt_registry.blobs import BlobUse, StagedBlob, read_uses
from softprompt_registry.catalog import AdapterVersion, Draft, EventType
from softprompt_registry.codec import encode_version
from softprompt_registry.connection import LOST, reply, store_errors, writes
from softprompt_registry.full import also_when_full
from softprompt_registry.pointers import Pointers
from softprompt_registry.scripts import read_fields
from softprompt_registry.store import Store
from softprompt_registry.transactions import begin, transact

IDEMPOTENCY_TTL_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doomed:
    """What must be known of a version to delete it; digest and sha256 may be wrong where its record is damaged."""

    id: int
    number: int
    digest: str
    sha256: str
    is_pinned: bool


class Changes:
    """Publish and delete versions."""

    def __init__(self, client: Redis, store: Store) -> None:
        self._client = client
        self._store = store

    async def publish(self, draft: Draft, staged: StagedBlob, *, key: str, content: str) -> AdapterVersion:
        """Make a draft the next version of its name: durable, and visible to everybody at once.

        Args:
            key: idempotency key, or "".
            content: sha256 of what the client sent, kept with the key.

        Raises:
            AdapterConflict: the key was used for other content meanwhile.
            Unavailable: the store is away.
        """
        async with store_errors():
            version_id = int(await self._client.incr(keys.IDS))
        try:
            return await self._publish(draft, staged, version_id=version_id, key=key, content=content)
        except Unavailable as error:
            # The answer to the transaction may be lost, and not the transaction.
            with suppress(Unavailable):
                if version := await self._store.find_id(version_id):
                    return version
            if not isinstance(error.__cause__, LOST):
                raise
            # It may still be on its way to the store.
            raise Unavailable(
                "the store went away, and the adapter may have been registered; ask for it, or register again "
                "with an idempotency key"
            ) from error

    @writes
    async def _publish(
        self, draft: Draft, staged: StagedBlob, *, version_id: int, key: str, content: str
    ) -> AdapterVersion:
        async def attempt(pipe: Pipeline) -> AdapterVersion | None:
            if key and await reply(pipe.exists(keys.idempotency(key))):
                return None
            if staged.keys and await reply(pipe.exists(*staged.keys)) != len(staged.keys):
                raise Unavailable("the upload took too long and expired; register again")
            old = await pointers.read(pipe, draft.name)
            number = old.next
            version = AdapterVersion(**_fields(draft), version=number, id=version_id, created_at=datetime.now(UTC))
            new = replace(old, highest=version_id, next=number + 1).after(LATEST, version_id)
            begin(pipe, draft.name, new)
            pipe.hset(keys.version(version_id), mapping=encode_version(version))
            pipe.hdel(keys.aliases(draft.name), LATEST)
            pipe.zadd(keys.versions(draft.name), {str(version_id): number})
            pipe.zadd(keys.NAMES, {keys.listed(draft.name): 0})
            pipe.zadd(keys.digest(draft.digest), {str(version_id): version_id})
            staged.publish(pipe)
            events.append(pipe, EventType.REGISTERED, name=draft.name, id_=version_id, version=number)
            if key:
                pipe.set(keys.idempotency(key), f"{content}:{version_id}", ex=IDEMPOTENCY_TTL_S)
            await pipe.execute()
            return new.describe(version)

        also = [*staged.keys, *([keys.idempotency(key)] if key else [])]
        version = await transact(self._client, draft.name, attempt, also=also)
        # Looked up with no connection held: holders that each wait for one more would wait for each other.
        version = version or await self._store.made_by(key, content, draft.base_model.id)
        if version is None:
            raise Unavailable("the idempotency key expired at this moment; register again")
        return version

    @writes
    async def delete_adapter(self, name: str) -> int:
        """Delete a name with all its versions and aliases; how many versions there were, 0: no such name.

        Damaged counters are replaced, so that the name can be registered anew.

        Raises:
            AdapterInUse: a version is pinned.
        """

        async def attempt(pipe: Pipeline) -> int:
            doomed = await self._doomed(pipe, name, low="-inf", high="+inf")
            old = await self._readable_pointers(pipe, name)
            if doomed or old is None:
                blobs = await self._blobs(pipe, doomed)
                last = old or await self._beyond_all(doomed)
                new = replace(last, highest=0, moved={}, revision=last.revision + 1)
                begin(pipe, name, new)
                self._remove(pipe, name, doomed, blobs)
                pipe.unlink(keys.aliases(name))
                pipe.zrem(keys.NAMES, keys.listed(name))
                events.append(pipe, EventType.ADAPTER_DELETED, name=name)
                await pipe.execute()
            return len(doomed)

        return await transact(self._client, name, attempt)

    @writes
    async def delete_version(self, name: str, number: int) -> bool:
        """Delete one version, with the name when it is its last; False when there is no such version.

        Raises:
            AdapterInUse: it is pinned, or an alias other than `latest` points to it.
        """

        async def attempt(pipe: Pipeline) -> bool:
            doomed = await self._doomed(pipe, name, low=number, high=number)
            if doomed:
                old = await pointers.read(pipe, name)
                aliases = old.aliases_of(doomed[0].id)
                if free := [alias for alias in aliases if alias != LATEST]:
                    raise catalog.aliased(name, number, free)
                highest = await self._highest_but(pipe, name, doomed[0].id)
                blobs = await self._blobs(pipe, doomed)
                kept = {alias: target for alias, target in old.moved.items() if target != doomed[0].id}
                begin(pipe, name, replace(old, highest=highest, moved=kept, revision=old.revision + 1))
                self._remove(pipe, name, doomed, blobs)
                if LATEST in aliases:
                    pipe.hdel(keys.aliases(name), LATEST)
                events.append(
                    pipe,
                    EventType.VERSION_DELETED,
                    name=name,
                    version=number,
                    digest=doomed[0].digest,
                    alias=LATEST if LATEST in aliases else "",
                )
                if not highest:
                    pipe.zrem(keys.NAMES, keys.listed(name))
                    events.append(pipe, EventType.ADAPTER_DELETED, name=name)
                await pipe.execute()
            return bool(doomed)

        return await transact(self._client, name, attempt)

    async def _readable_pointers(self, pipe: Pipeline, name: str) -> Pointers | None:
        try:
            return await pointers.read(pipe, name)
        except DataCorrupted:
            return None

    async def _beyond_all(self, doomed: Sequence[_Doomed]) -> Pointers:
        """Pointers of a name whose counters are damaged: above any number and revision that it can have had."""
        # Each version took an id of its own, so no number is above the newest id.
        newest_id = int(await reply(also_when_full(self._client, "INCR", keys.IDS)))
        number = max([newest_id, *(version.number + 1 for version in doomed)])
        return Pointers(highest=0, moved={}, revision=time.time_ns() // 1_000_000, next=number)

    async def _highest_but(self, pipe: Pipeline, name: str, version_id: int) -> int:
        """The version with the highest number but for one; 0: there is none."""
        highest = await reply(pipe.zrange(keys.versions(name), 0, 1, desc=True))
        return next((int(found) for found in highest if int(found) != version_id), 0)

    async def _doomed(self, pipe: Pipeline, name: str, *, low: float | str, high: float | str) -> list[_Doomed]:
        """The versions with these numbers; AdapterInUse where one is pinned."""
        found = await reply(pipe.zrangebyscore(keys.versions(name), low, high, withscores=True))
        records = await read_fields(
            pipe, [keys.version(int(version_id)) for version_id, _ in found], "digest", "tensors_sha256", "pinned"
        )
        doomed = []
        for (version_id, number), record in zip(found, records, strict=True):
            digest, sha256, pinned = (text.decode(errors="replace") if text else "" for text in record)
            doomed.append(
                _Doomed(
                    id=int(version_id), number=int(number), digest=digest, sha256=sha256, is_pinned=pinned == "1"
                )
            )
        if pinned_numbers := [version.number for version in doomed if version.is_pinned]:
            raise catalog.pinned(name, pinned_numbers)
        return doomed

    async def _blobs(self, pipe: Pipeline, doomed: Sequence[_Doomed]) -> dict[str, BlobUse]:
        """The blobs that versions use, watched; without those whose users cannot be told."""
        sha256s = list({version.sha256 for version in doomed if version.sha256})
        if sha256s:
            await pipe.watch(*map(keys.blob, sha256s))
        return await read_uses(pipe, sha256s)

    def _remove(self, pipe: Pipeline, name: str, doomed: Sequence[_Doomed], blobs: Mapping[str, BlobUse]) -> None:
        """Queue the removal of versions, and of the blobs that nobody uses then."""
        for version in doomed:
            pipe.unlink(keys.version(version.id))
            pipe.zrem(keys.versions(name), version.id)
            pipe.zrem(keys.digest(version.digest), version.id)
        for sha256, num_gone in Counter(version.sha256 for version in doomed).items():
            if not (use := blobs.get(sha256)):
                continue
            if use.num_versions > num_gone:
                also_when_full(pipe, "HSET", keys.blob(sha256), "num_versions", use.num_versions - num_gone)
            else:
                pipe.unlink(keys.blob(sha256), *(keys.chunk(sha256, index) for index in range(use.num_chunks)))


def _fields(draft: Draft) -> dict[str, Any]:
    return {field.name: getattr(draft, field.name) for field in fields(draft)}
