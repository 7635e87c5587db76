"""Names, versions and base models in the store, as they are read.

What cannot be read is an error for whoever asks for it, and is left out of lists: it must not take others along.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from redis.asyncio import Redis
from softprompt_api.errors import AdapterConflict, DataCorrupted, InvalidArgument
from softprompt_api.names import LATEST, AdapterRef
from softprompt_api.tenants import full_name, local_name, tenant_of

from softprompt_registry import catalog, keys, pointers
from softprompt_registry.blobs import BlobStart
from softprompt_registry.catalog import AdapterVersion, BaseModel
from softprompt_registry.codec import decode_base_model, decode_version, encode_base_model
from softprompt_registry.connection import reads, reply, writes
from softprompt_registry.full import also_when_full
from softprompt_registry.lookups import Found, Lookups, Seals
from softprompt_registry.pointers import Pointers
from softprompt_registry.recent import Kept, Recent
from softprompt_registry.scripts import read_fields, read_hashes

_log = structlog.get_logger()
_MAX_NAMES_COMPARED = 500
_VERSIONS_AT_ONCE = 100
# An inference service announces its model every 15 s.
_ANNOUNCED_LATELY_S = 60


class Store:
    """Read adapters and base models. What is deleted between two reads is as if it had never been asked for."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._lookups = Lookups(client)
        self._recent = Recent()

    @reads
    async def find(self, ref: AdapterRef) -> AdapterVersion | None:
        """The version a spelling names; None when there is none."""
        kept = self._recent.find(ref)
        found = await self._look_up(ref, kept)
        if kept and found and found.is_unchanged:
            return kept.version
        version, sha256 = _decode(ref, found)
        if found is None or version is None:
            return None
        # A digest names content, whatever is the matter with the name of a version that has it.
        known = _readable_pointers(version.name, found.pointers) if ref.digest else pointers.decode(found.pointers)
        if known is None:
            return version
        version = known.describe(version)
        seals = Seals(pointers=pointers.sha256(known).encode(), record=sha256)
        self._recent.keep(ref, Kept(version=version, seals=seals))
        return version

    @reads
    async def find_with_file(
        self, ref: AdapterRef, *, up_to_bytes: int
    ) -> tuple[AdapterVersion, BlobStart | None] | None:
        """The version that a name stands for, and its file where it is no larger; None: there is none."""
        found = await self._lookups.by_name(
            ref.name, alias=ref.alias, number=ref.version, file_up_to_bytes=up_to_bytes
        )
        version, _ = _decode(ref, found)
        if found is None or version is None:
            return None
        return pointers.decode(found.pointers).describe(version), found.start

    @reads
    async def find_content(
        self, ref: AdapterRef, *, chunk: int, base_model_id: str
    ) -> tuple[AdapterVersion, BlobStart | None] | None:
        """The version with a digest, without what points to it, and a chunk of its file; None when there is none.

        Of several, one that was registered for the base model, if there is one; the chunk is then left out.
        """
        content = await self._lookups.content(ref.digest, chunk=chunk)
        if content is None:
            version, _ = _decode(ref, await self._oldest(await self._with_digest(ref, base_model_id)))
            return (version, None) if version else None
        version, _ = _decode(ref, content)
        return (version, content.start) if version else None

    @reads
    async def find_id(self, version_id: int) -> AdapterVersion | None:
        """The version with a global id; None when there is none."""
        found = await self._lookups.by_id(version_id)
        version, _ = _decode(AdapterRef(), found)
        return pointers.decode(found.pointers).describe(version) if found and version else None

    @reads
    async def find_ids(self, version_ids: Sequence[int]) -> list[AdapterVersion | None]:
        """The versions with these global ids, in their order; None for one that was deleted or cannot be read."""
        versions = await self._load_readable(version_ids)
        names = list(dict.fromkeys(version.name for version in versions if version))
        known = dict(zip(names, await self._all_pointers(names), strict=True))
        return [
            one.describe(version) if version and (one := known[version.name]) else None for version in versions
        ]

    @reads
    async def pointers(self, name: str) -> Pointers:
        """What a name's aliases point to."""
        return await pointers.read(self._client, name)

    @reads
    async def latest_number(self, name: str) -> int | None:
        """The number of a name's latest version; None when there is no such name."""
        latest = (await pointers.read(self._client, name)).target(LATEST)
        number = await reply(self._client.zscore(keys.versions(name), latest)) if latest else None
        return None if number is None else int(number)

    @reads
    async def latest(self, names: Sequence[str]) -> list[AdapterVersion | None]:
        """The names' latest versions, in their order; None for one that was deleted or cannot be read."""
        known = await self._all_pointers(names)
        versions = await self._load_readable([one.target(LATEST) if one else 0 for one in known])
        return [
            one.describe(version) if one and version else None
            for one, version in zip(known, versions, strict=True)
        ]

    @reads
    async def versions(
        self, name: str, *, below: int | None, limit: int
    ) -> list[tuple[int, AdapterVersion | None]]:
        """A name's versions by number, newest first, with numbers below `below` (None: from the newest).

        None in place of a version that was deleted meanwhile, or cannot be read.
        """
        high = "+inf" if below is None else f"({below}"
        known = await pointers.read(self._client, name)
        found = await reply(
            self._client.zrevrangebyscore(keys.versions(name), high, "-inf", start=0, num=limit, withscores=True)
        )
        versions = await self._load_readable([int(version_id) for version_id, _ in found])
        return [
            (int(number), known.describe(version) if version else None)
            for (_, number), version in zip(found, versions, strict=True)
        ]

    @reads
    async def names(
        self, *, prefix: str, after: str, limit: int, all_tenants: bool = False, descending: bool = False
    ) -> list[str]:
        """Names in order that begin with a prefix, behind the name `after` ("": from the first).

        They are those of the tenant that the prefix begins with; without one, of the default tenant or of all.
        """
        low, high = ("-", "+") if all_tenants else _bounds(keys.listed(prefix))
        if after:
            member = keys.listed(after)
            # Anybody can make a token: beside the names of this list lie other tenants' names.
            if not (all_tenants or low[1:] <= member <= high[1:]):
                raise catalog.foreign_token()
            low, high = (low, f"({member}") if descending else (f"({member}", high)
        if descending:
            found = await reply(self._client.zrevrangebylex(keys.NAMES, high, low, start=0, num=limit))
        else:
            found = await reply(self._client.zrangebylex(keys.NAMES, low, high, start=0, num=limit))
        return [keys.unlisted(member.decode()) for member in found]

    @reads
    async def count_names(self, tenant: str | None = None) -> int:
        """How many names a tenant has, or all have."""
        low, high = ("-", "+") if tenant is None else _bounds(keys.listed(full_name(tenant, "")))
        return int(await reply(self._client.zlexcount(keys.NAMES, low, high)))

    async def names_near(self, name: str) -> list[str]:
        """A bounded number of names to compare a mistyped one with, as its tenant calls its adapters.

        Those that begin alike come first.
        """
        tenant, local = tenant_of(name), local_name(name)
        alike = await self.names(prefix=full_name(tenant, local[:1]), after="", limit=_MAX_NAMES_COMPARED)
        rest = _MAX_NAMES_COMPARED - len(alike) or 1
        others = await self.names(prefix=full_name(tenant, ""), after="", limit=rest)
        return list(dict.fromkeys(local_name(near) for near in (*alike, *others)))

    @reads
    async def made_by(self, key: str, content: str, base_model_id: str) -> AdapterVersion | None:
        """What an idempotency key made; None when it is "" or made nothing yet.

        Args:
            base_model_id: of the one it is to be for; "": not said.

        Raises:
            AdapterConflict: the key was used for other content or another base model, or what it made is deleted.
        """
        stored = await reply(self._client.get(keys.idempotency(key))) if key else None
        if stored is None:
            return None
        made_of, _, version_id = stored.decode().partition(":")
        version = await self.find_id(int(version_id)) if made_of == content else None
        if made_of != content or (version and base_model_id not in ("", version.base_model.id)):
            raise AdapterConflict(
                "this idempotency key was used for another registration", field="idempotency_key"
            )
        if version is None:
            raise AdapterConflict(
                "what this idempotency key made has been deleted; choose another key", field="idempotency_key"
            )
        return version

    @writes
    async def put_base_model(self, model: BaseModel) -> None:
        """Add or replace a base model, and remember when it was announced."""
        now_s, _ = await reply(self._client.time())
        pipe = self._client.pipeline(transaction=True)
        # What is told by who begins to serve: without it, nothing would be served beside a full store.
        also_when_full(pipe, "HSET", keys.BASE_MODELS, model.id, encode_base_model(model))
        also_when_full(pipe, "ZADD", keys.ANNOUNCED, now_s, model.id)
        await pipe.execute()

    async def base_models(self) -> list[BaseModel]:
        """All known base models, in order of ids, without those that cannot be read."""
        models, _ = await self.announced_base_models()
        return models

    @reads
    async def announced_base_models(self) -> tuple[list[BaseModel], set[str]]:
        """All known base models, as above, and the ids of those that were announced within the last minute."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(keys.BASE_MODELS)
        pipe.zrange(keys.ANNOUNCED, 0, -1, withscores=True)
        pipe.time()  # by the store's clock: several registries may be told
        stored, announced, (now_s, _) = await pipe.execute()
        models = (_readable_base_model(model_id, text) for model_id, text in stored.items())
        lately = {
            model_id.decode(errors="replace") for model_id, at_s in announced if at_s > now_s - _ANNOUNCED_LATELY_S
        }
        return sorted((model for model in models if model), key=lambda model: model.id), lately

    async def _look_up(self, ref: AdapterRef, kept: Kept | None) -> Found | None:
        """What the store has under a spelling, or that it is what was kept."""
        seals = kept.seals if kept else None
        if not ref.digest:
            return await self._lookups.by_name(ref.name, alias=ref.alias, number=ref.version, seals=seals)
        # What a digest has named it names as long as that is there.
        if kept and (found := await self._lookups.by_id(kept.version.id, seals=seals)) and found.is_unchanged:
            return found
        if found := await self._lookups.by_digest(ref.digest):
            return found
        return await self._oldest(await self._with_digest(ref, ""))

    async def _oldest(self, version_ids: Sequence[int]) -> Found | None:
        """The first of these that is still there."""
        for version_id in version_ids:
            if found := await self._lookups.by_id(version_id):
                return found
        return None

    async def _all_pointers(self, names: Sequence[str]) -> list[Pointers | None]:
        """Of each name, in their order; None where they are damaged."""
        told = await pointers.ask(self._client, names)
        return [_readable_pointers(name, one) for name, one in zip(names, told, strict=True)]

    async def _with_digest(self, ref: AdapterRef, base_model_id: str) -> list[int]:
        """Versions with a digest, of its owner where one is named, the oldest first; all have the same tensors.

        Those that were registered for the base model go before others. Where there is one alone, it may be another
        owner's.
        """
        preferred: list[int] = []
        others: list[int] = []
        start = 0
        while not preferred and (
            ids := await reply(self._client.zrange(keys.digest(ref.digest), start, start + _VERSIONS_AT_ONCE - 1))
        ):
            if start == 0 and len(ids) == 1:
                return [int(ids[0])]  # as most digests have it; whose it is, its record tells
            records = [keys.version(int(version_id)) for version_id in ids]
            # Whole ones may be large.
            told = await read_fields(self._client, records, "name", "base_model")
            for version_id, (name, base_model) in zip(ids, told, strict=True):
                if _is_owned(ref, name):
                    (preferred if _is_for(base_model, base_model_id) else others).append(int(version_id))
            start += len(ids)
        return preferred + others

    async def _load_readable(self, version_ids: Sequence[int]) -> list[AdapterVersion | None]:
        records = await read_hashes(self._client, [keys.version(version_id) for version_id in version_ids])
        return [_readable(id_, record) for id_, record in zip(version_ids, records, strict=True)]


def _bounds(prefix: str) -> tuple[str, str]:
    """The range of a sorted set's members that begin with a prefix; "": of all that no tenant stands before."""
    # Every character of a name sorts below "~", and that below DEL.
    return f"[{prefix}", f"[{prefix}\x7f" if prefix else "(~"


def _readable(version_id: int, fields: Mapping[bytes, bytes]) -> AdapterVersion | None:
    try:
        return decode_version(fields, version_id=version_id) if fields else None
    except DataCorrupted:
        _log.error("a stored version is damaged and left out of lists", id=version_id)
        return None


def _is_owned(ref: AdapterRef, name: bytes | None) -> bool:
    """Whether a version of this name is one of the owner's that a digest names."""
    # The id of a version that was deleted with its digest damaged is still there.
    return bool(name) and ref.owner in ("", tenant_of((name or b"").decode(errors="replace")))


def _is_for(base_model: bytes | None, model_id: str) -> bool:
    """Whether a version was registered for a base model; "": for any."""
    if not model_id:
        return True
    try:
        return decode_base_model(base_model or b"").id == model_id
    except (TypeError, ValueError):
        return False


def _readable_base_model(model_id: bytes, text: bytes) -> BaseModel | None:
    try:
        model = decode_base_model(text)
        catalog.check_base_model(model)
        if model.id != model_id.decode():
            raise ValueError("it is stored under another id")
    except (InvalidArgument, TypeError, ValueError) as error:
        _log.error("a stored base model is damaged and left out", model=repr(model_id), cause=str(error))
        return None
    return model


def _readable_pointers(name: str, told: Sequence[Any]) -> Pointers | None:
    try:
        return pointers.decode(told)
    except DataCorrupted:
        _log.error("the stored aliases of an adapter are damaged, and it is left out of lists", adapter=name)
        return None


def _decode(ref: AdapterRef, found: Found | None) -> tuple[AdapterVersion | None, bytes]:
    """The version that a spelling led to, and its record's sha256; None where there is none.

    Raises DataCorrupted when it is a version of something else.
    """
    if found is None or (ref.digest and not _is_owned(ref, found.record.get(b"name"))):
        return None, b""
    version = decode_version(found.record, version_id=found.version_id)
    has = (version.name, version.version, version.digest)
    for wanted, it_has in zip((ref.name, ref.version, ref.digest), has, strict=True):
        if wanted and wanted != it_has:
            raise DataCorrupted(f"the store answered with {version.name}@{version.version} for {ref}")
    return version, found.record.get(b"sha256", b"")
