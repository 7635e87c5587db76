"""A registration from its header to its version: checked while it streams in, visible only when it is whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from softprompt_api.errors import DeadlineExceeded, InvalidArgument, Unavailable
from softprompt_api.formats import DEFAULT_MAX_LORA_RANK, AdapterSpec, AdapterVerifier, ModelShape, parse_config
from softprompt_api.shares import Shares
from softprompt_api.tenants import tenant_of

from softprompt_registry import catalog
from softprompt_registry.blobs import CHUNK_BYTES, StagedBlob
from softprompt_registry.catalog import AdapterVersion, BaseModel, Draft, Registration
from softprompt_registry.changes import Changes
from softprompt_registry.store import Store

# A file of several tasks stays in memory until all of them were checked.
_MAX_HELD_BYTES = 2**28

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """What one upload, and all of them together, may take."""

    max_size_bytes: int
    max_concurrent: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of a file, and where it starts."""

    offset: int
    data: bytes


class Uploads:
    """Take uploads."""

    def __init__(self, client: Redis, store: Store, changes: Changes, limits: UploadLimits) -> None:
        self._client = client
        self._store = store
        self._changes = changes
        self._limits = limits
        self._running = Shares(limits.max_concurrent, what="uploads are running")
        self._held = Shares(_MAX_HELD_BYTES, what="bytes of adapters of several tasks are held to be checked")

    async def register(self, registration: Registration, pieces: AsyncIterator[Piece]) -> AdapterVersion:
        """Make the next version of a name from a header and the pieces of its tensor file."""
        catalog.check_registration(registration, max_size_bytes=self._limits.max_size_bytes)
        content = registration.content()
        async with self._slot(tenant_of(registration.name)):
            made = await self._store.made_by(registration.tenants_key, content, registration.base_model_id)
            if made:
                return made
            spec = parse_config(registration.config_json)
            # One that is larger than such a file can be is refused by its first bytes.
            held_bytes = min(registration.size_bytes, _MAX_HELD_BYTES) if spec.can_check_tasks() else 0
            with self._held.holding(tenant_of(registration.name), held_bytes) if held_bytes else nullcontext():
                return await self._upload(registration, spec, content, pieces)

    async def _upload(
        self, registration: Registration, spec: AdapterSpec, content: str, pieces: AsyncIterator[Piece]
    ) -> AdapterVersion:
        models, announced_lately = await self._store.announced_base_models()
        base = catalog.choose_base_model(models, registration.base_model_id, announced_lately)
        catalog.check_name_is_free_of_models(registration.name, models)
        verifier = AdapterVerifier(
            spec,
            size_bytes=registration.size_bytes,
            sha256=registration.sha256,
            model=_shape_of(base),
            all_tasks=True,
            with_norms=True,
        )
        # Longer than any upload may take: what is published cannot have expired.
        staged = StagedBlob(self._client, registration.sha256, ttl_s=int(self._limits.timeout_s) + 300)
        try:
            await _receive(pieces, verifier, staged)
            # Beside the loop: the prompts of many tasks take a while.
            verified = await asyncio.to_thread(verifier.finish)
            draft = Draft(
                name=registration.name,
                digest=verified.digest,
                kind=spec.kind,
                num_virtual_tokens=spec.num_virtual_tokens,
                hidden_size=spec.hidden_size,
                dtype=verified.tensor_dtype,
                size_bytes=verified.size_bytes,
                tensors_sha256=verified.sha256,
                config_json=registration.config_json,
                base_model=base,
                labels=dict(registration.labels),
                num_tasks=spec.num_tasks,
                rank=verified.rank,
                row_norms=verified.row_norms,
                warnings=catalog.warnings_for(registration.config_json, base, verified.row_norms),
            )
            version = await self._changes.publish(draft, staged, key=registration.tenants_key, content=content)
        finally:
            await _discard(staged)
        _log.info("registered", adapter=version.name, version=version.version, digest=version.digest)
        return version

    @asynccontextmanager
    async def _slot(self, tenant: str) -> AsyncIterator[None]:
        """One of a bounded number of uploads, for a bounded time."""
        with self._running.holding(tenant):
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    yield
            except TimeoutError:
                raise DeadlineExceeded(f"the upload took more than {self._limits.timeout_s:g} s") from None


def _shape_of(base: BaseModel) -> ModelShape:
    return ModelShape(
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        max_virtual_tokens=base.max_virtual_tokens,
        dtype=base.dtype,
        no_key_values=base.no_key_values,
        max_lora_rank=base.max_lora_rank or DEFAULT_MAX_LORA_RANK,
    )


async def _receive(pieces: AsyncIterator[Piece], verifier: AdapterVerifier, staged: StagedBlob) -> None:
    position = 0
    async for piece in pieces:
        if piece.offset != position:
            raise InvalidArgument(
                f"the chunk starts at {piece.offset}, but {position} bytes were sent before", field="chunk.offset"
            )
        if not 1 <= len(piece.data) <= CHUNK_BYTES:
            raise InvalidArgument(f"a chunk has 1 to {CHUNK_BYTES} bytes", field="chunk.data")
        position += len(piece.data)
        verifier.feed(piece.data)
        await staged.write(piece.data)


async def _discard(staged: StagedBlob) -> None:
    """Remove what an upload left; after a publication nothing is left."""
    try:
        await staged.discard()
    except Unavailable:
        _log.info("the store is away; what an upload left there expires by itself")
