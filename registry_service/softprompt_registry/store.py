"""Names, versions and base models in the store, as they are read."""

from collections.abc import Sequence

from redis.asyncio import Redis
from softprompt_api.errors import AdapterConflict
from softprompt_api.names import AdapterRef

from softprompt_registry import keys
from softprompt_registry.catalog import AdapterVersion, BaseModel
from softprompt_registry.codec import decode_base_model, decode_version, encode_base_model
from softprompt_registry.connection import reads, reply, writes

_MAX_NAMES_COMPARED = 500
_MAX_LOOKUPS = 3


class Store:
    """Read adapters and base models. What is deleted between two reads is as if it had never been asked for."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    @reads
    async def find(self, ref: AdapterRef) -> AdapterVersion | None:
        """The version a spelling names; None when there is none."""
        # A version may be deleted after its id was found; the name may have another latest version by then.
        for _ in range(_MAX_LOOKUPS):
            version_id = await self._find_id(ref)
            if version_id is None:
                return None
            if version := await self._load(version_id):
                return version
        return None

    @reads
    async def find_id(self, version_id: int) -> AdapterVersion | None:
        """The version with a global id; None when there is none."""
        return await self._load(version_id)

    @reads
    async def find_ids(self, version_ids: Sequence[int]) -> list[AdapterVersion | None]:
        """The versions with these ids, in their order; None for a deleted one."""
        pipe = self._client.pipeline(transaction=False)
        for version_id in version_ids:
            pipe.hgetall(keys.version(version_id))
        stored = zip(version_ids, await pipe.execute(), strict=True)
        return [decode_version(fields, version_id=id_) if fields else None for id_, fields in stored]

    @reads
    async def latest_number(self, name: str) -> int | None:
        """The highest live version number of a name; None when there is no such name."""
        newest = await reply(self._client.zrange(keys.versions(name), 0, 0, desc=True, withscores=True))
        return int(newest[0][1]) if newest else None

    async def latest(self, names: Sequence[str]) -> list[AdapterVersion | None]:
        """The names' latest versions, in their order; None for a deleted name."""
        return await self.find_ids(await self._latest_ids(names))

    @reads
    async def version_ids(self, name: str, *, below: int | None, limit: int) -> list[tuple[int, int]]:
        """A name's versions as (number, id), newest first, with numbers below `below` (None: from the newest)."""
        high = "+inf" if below is None else f"({below}"
        found = await reply(
            self._client.zrevrangebyscore(keys.versions(name), high, "-inf", start=0, num=limit, withscores=True)
        )
        return [(int(number), int(version_id)) for version_id, number in found]

    @reads
    async def names(self, *, prefix: str, after: str, limit: int) -> list[str]:
        """Names in order that begin with a prefix, behind the name `after` ("": from the first)."""
        low = f"({after}" if after else f"[{prefix}"
        high = f"[{prefix}\x7f" if prefix else "+"  # every character of a name sorts below DEL
        found = await reply(self._client.zrangebylex(keys.NAMES, low, high, start=0, num=limit))
        return [name.decode() for name in found]

    @reads
    async def count_names(self) -> int:
        """How many names there are."""
        return int(await reply(self._client.zcard(keys.NAMES)))

    async def names_near(self, name: str) -> list[str]:
        """A bounded number of names to compare a mistyped one with; those that begin alike come first."""
        alike = await self.names(prefix=name[:1], after="", limit=_MAX_NAMES_COMPARED)
        others = await self.names(prefix="", after="", limit=_MAX_NAMES_COMPARED - len(alike) or 1)
        return list(dict.fromkeys([*alike, *others]))

    @reads
    async def made_by(self, key: str, content: str) -> AdapterVersion | None:
        """What an idempotency key made; None when it is "" or made nothing yet.

        Raises:
            AdapterConflict: the key was used for other content, or what it made is deleted.
        """
        stored = await reply(self._client.get(keys.idempotency(key))) if key else None
        if stored is None:
            return None
        made_of, _, version_id = stored.decode().partition(":")
        if made_of != content:
            raise AdapterConflict(
                "this idempotency key was used for another registration", field="idempotency_key"
            )
        version = await self._load(int(version_id))
        if version is None:
            raise AdapterConflict(
                "what this idempotency key made has been deleted; choose another key", field="idempotency_key"
            )
        return version

    @writes
    async def put_base_model(self, model: BaseModel) -> None:
        """Add or replace a base model."""
        await reply(self._client.hset(keys.BASE_MODELS, model.id, encode_base_model(model)))

    @reads
    async def base_models(self) -> list[BaseModel]:
        """All known base models, in order of ids."""
        stored = await reply(self._client.hgetall(keys.BASE_MODELS))
        return sorted((decode_base_model(text) for text in stored.values()), key=lambda model: model.id)

    @reads
    async def _latest_ids(self, names: Sequence[str]) -> list[int]:
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.zrange(keys.versions(name), 0, 0, desc=True)
        # No version has the id 0.
        return [int(newest[0]) if newest else 0 for newest in await pipe.execute()]

    async def _find_id(self, ref: AdapterRef) -> int | None:
        if ref.digest:
            # All versions with one digest have the same tensors; the oldest is as good as any.
            ids = await reply(self._client.zrange(keys.digest(ref.digest), 0, 0))
            return int(ids[0]) if ids else None
        high, low = ("+inf", "-inf") if ref.version is None else (ref.version, ref.version)
        ids = await reply(self._client.zrevrangebyscore(keys.versions(ref.name), high, low, start=0, num=1))
        return int(ids[0]) if ids else None

    async def _load(self, version_id: int) -> AdapterVersion | None:
        fields = await reply(self._client.hgetall(keys.version(version_id)))
        return decode_version(fields, version_id=version_id) if fields else None
