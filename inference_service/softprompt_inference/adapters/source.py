"""Adapters from the registry: names resolved to versions, versions fetched and verified."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from functools import lru_cache, partial

import grpc
import structlog
from softprompt_api.errors import AdapterInvalid, AdapterNotFound, DataCorrupted, SoftpromptError, Unavailable
from softprompt_api.formats import (
    DEFAULT_MAX_LORA_RANK,
    AdapterSpec,
    AdapterVerifier,
    ModelShape,
    parse_config,
)
from softprompt_api.names import AdapterRef, choose_task, parse_adapter, parse_requested
from softprompt_api.quality import Probe
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc as pb_grpc
from softprompt_api.rpc.context import ask
from softprompt_api.rpc.quality import probe_to
from softprompt_api.tracing import span

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import MAX_FETCHES, MakeWay, no_way_needed
from softprompt_inference.adapters.reading import TensorReader, readable, translated
from softprompt_inference.adapters.transfer import Transfer, Wanted
from softprompt_inference.engine.steps import FREE_STEPS, Steps

RESOLVE_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 120.0
# An interrupted transfer goes on where it stopped; so many interruptions without a byte in between end it.
RESUME_DELAYS_S: Sequence[float] = (0.1, 0.3, 1.0, 2.0)

_MAX_HEADER_BYTES = 2**20 + 8
_MAX_VALUE_BYTES = 4
_GIB = 2**30
_SHAPE_FIELDS = ("architecture", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "vocab_size")

# Adapters of one training script differ in their tensors alone.
_parse_config = lru_cache(16)(parse_config)
_log = structlog.get_logger()


class AdapterSource:
    """The registry as the inference service sees it.

    Args:
        stub: the registry.
        base_model: the model that is served; an adapter made for another is refused.
        max_lora_bytes: largest tensor file of a LoRA.
    """

    def __init__(
        self, stub: "pb_grpc.RegistryServiceAsyncStub", base_model: pb.BaseModel, *, max_lora_bytes: int = 2 * _GIB
    ) -> None:
        self._stub = stub
        self._reader = TensorReader(stub)
        self._base_model = base_model
        self._max_lora_bytes = max_lora_bytes
        self._in_hand: OrderedDict[str, tuple[pb.AdapterVersion, bytes]] = OrderedDict()

    async def resolve(self, spelling: str) -> pb.AdapterVersion:
        """The version that a name, `name@version` or digest stands for now.

        AdapterNotFound: there is none. Unavailable: the registry cannot be asked.
        """
        try:
            request = pb.GetAdapterRequest(adapter=spelling)
            answer = await ask(self._stub.GetAdapter, request, timeout_s=RESOLVE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise translated(error) from error
        return readable(answer).adapter

    async def resolve_to_fetch(self, spelling: str) -> pb.AdapterVersion:
        """As `resolve`, where the adapter is fetched next: the file of a name comes along if it is small."""
        if parse_adapter(spelling).digest:
            return await self.resolve(spelling)
        try:
            with span("fetch", "client"):
                async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                    version, data = await self._reader.look_up(spelling)
        except AdapterNotFound:
            raise
        except (SoftpromptError, TimeoutError):  # the link, or the file, which may be in memory here
            return await self.resolve(spelling)
        # A version for another base model may not be the one that its digest would be fetched as.
        if data and version.base_model.id == self._base_model.id:
            self._in_hand[version.digest] = (version, data)
            if len(self._in_hand) > MAX_FETCHES:
                self._in_hand.popitem(last=False)
        return version

    async def record(self, version: pb.AdapterVersion, probe: Probe) -> pb.AdapterVersion:
        """Have the registry keep what was measured of a version; the version as it is then."""
        request = pb.RecordProbeRequest(
            adapter=f"{version.name}@{version.version}", digest=version.digest, probe=probe_to(probe)
        )
        try:
            answer = await ask(self._stub.RecordProbe, request, timeout_s=RESOLVE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise translated(error) from error
        return readable(answer).adapter

    async def fetch(
        self, spelling: str, make_way: MakeWay = no_way_needed, *, steps: Steps = FREE_STEPS
    ) -> Adapter:
        """What a digest, or `digest:task`, holds, verified.

        Args:
            make_way: awaited as soon as the file is known to be large; what it raises ends the fetch.
            steps: of the engine. While they would be held up, a large file comes in a piece beside each.

        InvalidArgument: it has no such task. AdapterInvalid: it does not fit the model. DataCorrupted: what came
        is not what was registered.
        """
        transfer = Transfer(ref=parse_requested(spelling))
        wanted = self._take_in_hand(transfer) or await self._read_in_time(transfer, make_way, steps)
        if not transfer.is_small:
            await steps.next()
        adapter = await transfer.work(partial(transfer.finish, wanted, spelling, self._base_model.dtype))
        _log.info("adapter fetched", adapter=wanted.version.name, version=wanted.version.version, digest=spelling)
        return adapter

    def _take_in_hand(self, transfer: Transfer) -> Wanted | None:
        """What came with its version, whole; None where nothing did."""
        version, data = self._in_hand.pop(transfer.ref.digest, (None, b""))
        if version is None:
            return None
        transfer.wanted = self._check(transfer.ref, version)
        transfer.new.append(data)
        return transfer.wanted

    async def _read_in_time(self, transfer: Transfer, make_way: MakeWay, steps: Steps) -> Wanted:
        try:
            with span("fetch", "client"):
                async with asyncio.timeout(FETCH_TIMEOUT_S):
                    return await self._read(transfer, make_way, steps)
        except TimeoutError as error:
            raise Unavailable("the registry is too slow to deliver the adapter; try again later") from error

    async def _read(self, transfer: Transfer, make_way: MakeWay, steps: Steps) -> Wanted:
        """Read the tensor file, resumed where the link was cut."""
        num_interruptions = 0
        while True:
            had_bytes = transfer.num_bytes
            try:
                await self._read_on(transfer, make_way, steps)
            except Unavailable:
                num_interruptions = 1 if transfer.num_bytes > had_bytes else num_interruptions + 1
                if num_interruptions > len(RESUME_DELAYS_S):
                    raise
                _log.warning(
                    "adapter transfer interrupted",
                    digest=transfer.ref.digest,
                    received_bytes=transfer.num_bytes,
                )
                await asyncio.sleep(RESUME_DELAYS_S[num_interruptions - 1])
            else:
                if transfer.wanted is None:
                    raise DataCorrupted("the registry did not say what it sent")
                return transfer.wanted

    async def _read_on(self, transfer: Transfer, make_way: MakeWay, steps: Steps) -> None:
        reading = self._reader.read(
            transfer.ref.digest, offset=transfer.num_bytes, base_model_id=self._base_model.id
        )
        async with aclosing(reading) as pieces:
            async for piece in pieces:
                if transfer.wanted is None:
                    transfer.wanted = self._check(transfer.ref, piece.version or pb.AdapterVersion())
                    if transfer.is_large:
                        await make_way()
                size_bytes = transfer.wanted.version.size_bytes
                if piece.offset != transfer.num_bytes or transfer.num_bytes + len(piece.data) > size_bytes:
                    raise DataCorrupted("the registry sent other bytes of the adapter than were asked for")
                transfer.new.append(piece.data)
                if transfer.is_due(beside_step=steps.are_held_up()):
                    await steps.next()  # as long as nothing more is taken, the registry sends no more
                    await transfer.work(transfer.keep)

    def _check(self, ref: AdapterRef, version: pb.AdapterVersion) -> Wanted:
        """What is to come, before most of it has: nothing is taken in for a file that cannot be it."""
        if version.digest != ref.digest:
            raise DataCorrupted("the registry answered with another version than it was asked for")
        spec = _parse_config(version.config_json)
        task = choose_task(ref, spec.num_tasks)
        check_fits(version, self._base_model)
        verifier = AdapterVerifier(
            spec, size_bytes=version.size_bytes, sha256=version.tensors_sha256, model=shape_of(self._base_model)
        )
        self._check_size(version, spec)
        return Wanted(version=version, spec=spec, task=task, verifier=verifier)

    def _check_size(self, version: pb.AdapterVersion, spec: AdapterSpec) -> None:
        num_values = spec.max_values()
        if num_values is None:  # the config of a LoRA does not say
            if version.size_bytes > self._max_lora_bytes:
                raise AdapterInvalid(
                    f"the adapter has {version.size_bytes} bytes; at most {self._max_lora_bytes} are served "
                    "(max_lora_bytes)",
                    field="adapter",
                )
            return
        most = _MAX_HEADER_BYTES + num_values * _MAX_VALUE_BYTES
        if not 0 < version.size_bytes <= most:
            raise DataCorrupted(
                f"the registry gives the adapter {version.size_bytes} bytes; its config allows {most}"
            )


def shape_of(base_model: pb.BaseModel) -> ModelShape:
    """What a base model demands of its adapters."""
    return ModelShape(
        hidden_size=base_model.hidden_size,
        num_layers=base_model.num_layers,
        num_kv_heads=base_model.num_kv_heads,
        head_dim=base_model.head_dim,
        max_virtual_tokens=base_model.max_virtual_tokens,
        max_lora_rank=base_model.max_lora_rank or DEFAULT_MAX_LORA_RANK,
        dtype=base_model.dtype,
        no_key_values=base_model.no_key_values,
    )


def check_fits(version: pb.AdapterVersion, base_model: pb.BaseModel) -> None:
    """Raise AdapterInvalid when the version was registered for a model of another shape."""
    made_for = version.base_model
    for name in _SHAPE_FIELDS:
        expected, found = getattr(base_model, name), getattr(made_for, name)
        if found and found != expected:
            raise AdapterInvalid(
                f"the adapter was made for a model with {name} {found}, and this model has {expected}; "
                "use an adapter trained for this model",
                field="adapter",
            )
    if made_for.tokenizer_sha256 not in ("", base_model.tokenizer_sha256):
        # Of equal shape it may be an update that changes nothing; so this is said and not refused.
        _log.warning("adapter was registered under another tokenizer", adapter=version.name, digest=version.digest)
