"""What the registry does, in words of its own: the servicer puts them on the wire."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from redis.asyncio import Redis
from softprompt_api.errors import AdapterNotFound, DataCorrupted, InvalidArgument
from softprompt_api.names import LATEST, AdapterRef, check_alias, check_full_name, parse_adapter
from softprompt_api.quality import Probe
from softprompt_api.tenants import local_name, tenant_of

from softprompt_registry import catalog
from softprompt_registry.amendments import Amendments, VersionUpdate
from softprompt_registry.blobs import BlobReader, BlobStart, chunk_of
from softprompt_registry.catalog import AdapterVersion, BaseModel, check_labels
from softprompt_registry.changes import Changes
from softprompt_registry.claim import Claim
from softprompt_registry.events import EventLog
from softprompt_registry.imports import Imports
from softprompt_registry.key_store import KeyStore
from softprompt_registry.leases import Leases
from softprompt_registry.pages import Page, read_page
from softprompt_registry.sources import Folders, Hub
from softprompt_registry.stopping import Stopping
from softprompt_registry.store import Store
from softprompt_registry.uploads import Piece, UploadLimits, Uploads
from softprompt_registry.watching import Watching


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One page of names: where the stream of changes stood before it was read, and how many names there are."""

    page: Page[AdapterVersion]
    cursor: str
    total: int


class Registry:
    """Adapters, their versions and their tensors.

    Args:
        client: the store, for short commands.
        watch_client: the same store, for commands that wait up to `heartbeat_s`.
        lease_s: for how long leases hold; 0: none are given.
        import_root: folders below it may be imported; None: none may.
        allow_hub_imports: whether repositories of the hub may be imported.
    """

    def __init__(
        self,
        client: Redis,
        watch_client: Redis,
        *,
        limits: UploadLimits,
        heartbeat_s: float,
        lease_s: float,
        max_watchers: int,
        import_root: Path | None = None,
        allow_hub_imports: bool = False,
    ) -> None:
        self._store = Store(client)
        self._blobs = BlobReader(client)
        self._changes = Changes(client, self._store)
        self._amendments = Amendments(client)
        self._events = EventLog(client, watch_client)
        self.keys = KeyStore(client)
        self.uploads = Uploads(client, self._store, self._changes, limits)
        self.imports = Imports(
            self.uploads,
            Folders(import_root, max_size_bytes=limits.max_size_bytes),
            Hub(is_allowed=allow_hub_imports, max_size_bytes=limits.max_size_bytes),
            timeout_s=limits.timeout_s,
        )
        self.stopping = Stopping()
        self.watching = Watching(
            self._store,
            self.keys,
            self._events,
            self.stopping,
            heartbeat_s=heartbeat_s,
            max_watchers=max_watchers,
        )
        claim = Claim(client, lease_s=lease_s)
        self.leases = Leases(self._events, claim, self.stopping, lease_s=lease_s, max_holders=max_watchers)

    async def get(self, spelling: str) -> AdapterVersion:
        """The version a spelling names; AdapterNotFound tells what may have been meant."""
        ref = parse_adapter(spelling)
        version = await self._store.find(ref)
        if version is None:
            raise await self._not_found(ref)
        return version

    async def list_adapters(
        self,
        *,
        size: int,
        token: str,
        prefix: str,
        all_tenants: bool = False,
        labels: Mapping[str, str] | None = None,
        descending: bool = False,
    ) -> Listing:
        """One page of the names that begin with a prefix, each with its latest version.

        They are of the tenant that the prefix begins with, or without one of the default tenant, or of all.

        Args:
            labels: which the latest version must all have.
        """
        if (all_tenants and prefix) or "~" in prefix:
            raise InvalidArgument(
                "name_prefix must be the beginning of a name, and empty for all_tenants", field="name_prefix"
            )
        wanted = dict(labels or {})
        check_labels(wanted)

        async def fetch(after: str, limit: int) -> Sequence[tuple[str, AdapterVersion | None]]:
            names = await self._store.names(
                prefix=prefix, after=after, limit=limit, all_tenants=all_tenants, descending=descending
            )
            versions = await self._store.latest(names)
            return [
                (name, version if version and wanted.items() <= version.labels.items() else None)
                for name, version in zip(names, versions, strict=True)
            ]

        cursor = await self._events.position()
        query = f"adapters {'*' if all_tenants else prefix} {sorted(wanted.items())} {descending}"
        page = await read_page(fetch, query=query, size=size, token=token, is_sparse=bool(wanted))
        total = await self._store.count_names(None if all_tenants else tenant_of(prefix))
        return Listing(page=page, cursor=cursor, total=total)

    async def list_versions(self, name: str, *, size: int, token: str) -> Page[AdapterVersion]:
        """One page of a name's versions, newest first."""

        async def fetch(after: str, limit: int) -> Sequence[tuple[str, AdapterVersion | None]]:
            found = await self._store.versions(name, below=_number(after), limit=limit)
            return [(str(number), version) for number, version in found]

        check_full_name(name)
        if await self._store.latest_number(name) is None:
            raise await self._not_found(AdapterRef(name=name))
        return await read_page(fetch, query=f"versions {name}", size=size, token=token)

    async def set_alias(
        self, name: str, alias: str, number: int, *, expected: int | None
    ) -> AdapterVersion | None:
        """Make an alias of a name point to a version, or remove it (0); the version it points to now."""
        check_full_name(name)
        check_alias(alias)
        if number == 0:
            if alias == LATEST:
                raise InvalidArgument(f"{LATEST} cannot be removed; it can be moved", field="alias")
            if not await self._amendments.remove_alias(name, alias, expected=expected):
                raise await self._not_found(AdapterRef(name=name, alias=alias))
            return None
        ref = parse_adapter(f"{name}@{number}", field="version")
        version = await self._amendments.set_alias(name, alias, number, expected=expected)
        if version is None:
            raise await self._not_found(ref)
        return version

    async def update(self, spelling: str, update: VersionUpdate) -> AdapterVersion:
        """Change labels and pin of the version that a name, with a number or an alias, stands for."""
        ref = parse_adapter(spelling)
        if ref.digest:
            raise InvalidArgument("several versions may have this digest; say name@version", field="adapter")
        version = await self._amendments.update(ref, update)
        if version is None:
            raise await self._not_found(ref)
        return version

    async def record_probe(self, spelling: str, digest: str, probe: Probe) -> AdapterVersion:
        """Keep what was measured of a digest with the version that a spelling, which is no digest, stands for."""
        ref = parse_adapter(spelling)
        if ref.digest:
            raise InvalidArgument("several versions may have this digest; say name@version", field="adapter")
        catalog.check_probe(probe)
        version = await self._amendments.record_probe(ref, digest, replace(probe, probed_at=datetime.now(UTC)))
        if version is None:
            raise await self._not_found(ref)
        return version

    async def delete_adapter(self, name: str) -> int:
        """Delete a name with all its versions; returns how many there were."""
        check_full_name(name)
        num_deleted = await self._changes.delete_adapter(name)
        if not num_deleted:
            raise await self._not_found(AdapterRef(name=name))
        return num_deleted

    async def delete_version(self, name: str, number: int) -> None:
        """Delete one version."""
        ref = parse_adapter(f"{check_full_name(name)}@{number}", field="version")
        if not await self._changes.delete_version(name, number):
            raise await self._not_found(ref)

    async def read(
        self, digest: str, *, offset: int, base_model_id: str = ""
    ) -> AsyncIterator[tuple[AdapterVersion, Piece]]:
        """A version's tensor file from an offset, piece by piece; every piece was compared with its sha256.

        Of several versions with the digest, one that was registered for the base model is preferred.
        """
        ref = parse_adapter(digest, field="digest")
        if not ref.digest:
            raise catalog.not_found(ref)
        found = await self._store.find_content(ref, chunk=chunk_of(offset), base_model_id=base_model_id)
        if found is None:
            raise catalog.not_found(ref)
        version, start = found
        async for piece in self._pieces(ref, version, offset, start):
            yield version, piece

    async def read_named(self, spelling: str, *, up_to_bytes: int) -> AsyncIterator[tuple[AdapterVersion, Piece]]:
        """The version that a name stands for, and its tensor file; of one with more bytes, an empty piece."""
        ref = parse_adapter(spelling)
        if ref.digest:
            raise InvalidArgument("a name is expected here; a digest has a field of its own", field="adapter")
        found = await self._store.find_with_file(ref, up_to_bytes=up_to_bytes)
        if found is None:
            raise await self._not_found(ref)
        version, start = found
        if start is None:
            yield version, Piece(offset=0, data=b"")
            return
        async for piece in self._pieces(ref, version, 0, start):
            yield version, piece

    async def _pieces(
        self, ref: AdapterRef, version: AdapterVersion, offset: int, start: BlobStart | None
    ) -> AsyncIterator[Piece]:
        try:
            async for at, data in self._blobs.read(version.tensors_sha256, offset=offset, start=start):
                yield Piece(offset=at, data=data)
        except AdapterNotFound:
            if await self._store.find(ref) is None:
                raise
            raise DataCorrupted("the stored tensors are missing; register the adapter again") from None

    async def put_base_model(self, model: BaseModel) -> None:
        """Tell of a base model that is served; replaces what was known under its id."""
        catalog.check_base_model(model)
        await self._store.put_base_model(model)

    async def base_models(self) -> list[BaseModel]:
        """All known base models, in order of ids."""
        return await self._store.base_models()

    async def _not_found(self, ref: AdapterRef) -> AdapterNotFound:
        if ref.digest:
            return catalog.not_found(ref)
        latest = None if ref.is_latest else await self._store.latest_number(ref.name)
        if latest is not None:
            return catalog.not_found(ref, latest=latest, aliases=(await self._store.pointers(ref.name)).moved)
        near = catalog.nearest_name(local_name(ref.name), await self._store.names_near(ref.name))
        return catalog.not_found(ref, near=near)


def _number(after: str) -> int | None:
    """The number of the version that a page begins after; None on the first page."""
    try:
        return int(after) if after else None
    except ValueError:
        raise catalog.foreign_token() from None
