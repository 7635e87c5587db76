"""What is kept beside a version's content and may change: aliases, labels, pins, and what was measured of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from softprompt_api.errors import AdapterConflict, AliasMoved, InvalidArgument
from softprompt_api.names import LATEST, AdapterRef, shown
from softprompt_api.quality import Probe
from softprompt_api.tenants import local_name

from softprompt_registry import catalog, events, keys, pointers
from softprompt_registry.catalog import AdapterVersion, EventType
from softprompt_registry.codec import decode_version, encode_version
from softprompt_registry.connection import reply, writes
from softprompt_registry.full import also_when_full
from softprompt_registry.transactions import begin, transact

MAX_ALIASES = 64
_LABEL = "labels."


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionUpdate:
    """What to change of a version.

    Attributes:
        replaces_labels: whether labels that are not in `labels` go.
        labels: new labels; None removes one.
        pinned: None leaves the pin as it is.
    """

    replaces_labels: bool = False
    labels: Mapping[str, str | None]
    pinned: bool | None = None

    @classmethod
    def of(cls, paths: Iterable[str], *, labels: Mapping[str, str], pinned: bool) -> Self:
        """The update that the paths of a mask select; InvalidArgument for a path that selects nothing."""
        paths = set(paths)
        if not paths:
            raise InvalidArgument("update_mask names nothing to change", field="update_mask")
        named = {path.removeprefix(_LABEL) for path in paths if path.startswith(_LABEL)}
        for path in paths - {"labels", "pinned"}:
            if not path.startswith(_LABEL):
                raise InvalidArgument(
                    f"update_mask: {shown(path)} cannot be changed; labels, labels.KEY and pinned can",
                    field="update_mask",
                )
        return cls(
            replaces_labels="labels" in paths,
            labels={**{key: labels.get(key) for key in named}, **(labels if "labels" in paths else {})},
            pinned=pinned if "pinned" in paths else None,
        )

    def applied_to(self, version: AdapterVersion) -> AdapterVersion:
        """The version with this changed; InvalidArgument where it would have too many labels, or bad ones."""
        merged = {**({} if self.replaces_labels else version.labels), **self.labels}
        labels = {key: value for key, value in merged.items() if value is not None}
        catalog.check_labels(labels)
        return replace(version, labels=labels, pinned=version.pinned if self.pinned is None else self.pinned)


class Amendments:
    """Move aliases, change labels and pins, keep probes."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    @writes
    async def set_alias(
        self, name: str, alias: str, number: int, *, expected: int | None
    ) -> AdapterVersion | None:
        """Make an alias point to a version; the version, or None when there is none with this number.

        Raises:
            AliasMoved: the alias points neither to the expected version (0: none) nor there already.
        """

        async def attempt(pipe: Pipeline) -> AdapterVersion | None:
            found = await reply(pipe.zrangebyscore(keys.versions(name), number, number))
            version = await self._version(pipe, int(found[0])) if found else None
            if version is None:
                return None
            old = await pointers.read(pipe, name)
            if old.target(alias) == version.id:
                return old.describe(version)
            await self._compare(pipe, name, alias, old.target(alias), expected)
            new = old.after(alias, version.id)
            if len(new.moved) > MAX_ALIASES:
                raise InvalidArgument(
                    f"{local_name(name)} has {MAX_ALIASES} aliases, as many as are allowed", field="alias"
                )
            begin(pipe, name, new)
            if alias in new.moved:
                also_when_full(pipe, "HSET", keys.aliases(name), alias, version.id)
            else:
                pipe.hdel(keys.aliases(name), alias)
            events.append(pipe, EventType.ALIAS_SET, name=name, id_=version.id, version=number, alias=alias)
            await pipe.execute()
            return new.describe(version)

        return await transact(self._client, name, attempt)

    @writes
    async def remove_alias(self, name: str, alias: str, *, expected: int | None) -> bool:
        """Remove an alias that is not `latest`; False when there is none.

        Raises:
            AliasMoved: the alias does not point to the expected version.
        """
        assert alias != LATEST

        async def attempt(pipe: Pipeline) -> bool:
            old = await pointers.read(pipe, name)
            target = old.target(alias)
            if not target:
                return False
            await self._compare(pipe, name, alias, target, expected)
            begin(pipe, name, old.after(alias, 0))
            pipe.hdel(keys.aliases(name), alias)
            events.append(pipe, EventType.ALIAS_REMOVED, name=name, alias=alias)
            await pipe.execute()
            return True

        return await transact(self._client, name, attempt)

    @writes
    async def update(self, ref: AdapterRef, update: VersionUpdate) -> AdapterVersion | None:
        """Change labels and pin of the version that a name stands for; None when there is none."""
        return await self._amend(ref, update.applied_to)

    @writes
    async def record_probe(self, ref: AdapterRef, digest: str, probe: Probe) -> AdapterVersion | None:
        """Keep a measurement with the version that a name stands for; None when there is none.

        Raises:
            AdapterConflict: the version has another digest than what was measured.
        """

        def measured(version: AdapterVersion) -> AdapterVersion:
            if version.digest != digest:
                raise AdapterConflict(
                    f"{version.name}@{version.version} has another digest than what was measured", field="digest"
                )
            return replace(version, probe=probe)

        return await self._amend(ref, measured)

    async def _amend(
        self, ref: AdapterRef, change: Callable[[AdapterVersion], AdapterVersion]
    ) -> AdapterVersion | None:
        """Change what is kept beside the content of the version that a name stands for."""

        async def attempt(pipe: Pipeline) -> AdapterVersion | None:
            old = await pointers.read(pipe, ref.name)
            version_id = old.target(ref.alias or LATEST)
            if ref.version is not None:
                found = await reply(pipe.zrangebyscore(keys.versions(ref.name), ref.version, ref.version))
                version_id = int(found[0]) if found else 0
            version = await self._version(pipe, version_id)
            if version is None:
                return None
            updated = change(version)
            if updated == version:
                return old.describe(version)
            new = replace(old, revision=old.revision + 1)
            begin(pipe, ref.name, new)
            fields = chain.from_iterable(encode_version(updated).items())
            also_when_full(pipe, "HSET", keys.version(version_id), *fields)  # or a pinned one could not be deleted
            events.append(pipe, EventType.UPDATED, name=ref.name, id_=version_id, version=version.version)
            await pipe.execute()
            return new.describe(updated)

        return await transact(self._client, ref.name, attempt)

    async def _version(self, pipe: Pipeline, version_id: int) -> AdapterVersion | None:
        fields = await reply(pipe.hgetall(keys.version(version_id)))
        return decode_version(fields, version_id=version_id) if fields else None

    async def _compare(self, pipe: Pipeline, name: str, alias: str, target: int, expected: int | None) -> None:
        if expected is None:
            return
        number = int(await reply(pipe.zscore(keys.versions(name), target)) or 0) if target else 0
        if number != expected:
            found = f"points to version {number}" if number else "does not exist"
            wanted = f"to point to version {expected}" if expected else "not to exist"
            raise AliasMoved(
                f"the alias {alias} of {local_name(name)} {found}, and was expected {wanted}",
                field="expected_version",
                details={"version": str(number)},
            )
