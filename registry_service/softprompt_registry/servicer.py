"""RegistryService on the wire: parse, call, format. Errors become statuses in the server's interceptor.

Changes are logged, whoever makes them: a gateway, which logs for whom, or somebody else.
"""

# gRPC names the methods and their arguments.
# ruff: noqa: ARG002, N802

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import grpc
from softprompt_api.audit import audited
from softprompt_api.errors import AdapterConflict, AdapterNotFound, AliasMoved, InvalidArgument, Unavailable
from softprompt_api.names import shown
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import SMALL_FILE_BYTES
from softprompt_api.rpc.context import enter_call
from softprompt_api.rpc.quality import probe_from
from softprompt_api.rpc.tracing import serve_call
from softprompt_api.tracing import Tracer

from softprompt_registry.convert import (
    base_model_from,
    base_model_to,
    change_to,
    import_from,
    registration_from,
    update_from,
    version_to,
)
from softprompt_registry.registry import Registry
from softprompt_registry.uploads import Piece

_MAX_SHOWN = 256  # whole names
_MAX_DRAIN_S = 60.0
_MAX_DRAIN_IDLE_S = 1.0
_READ_TENSORS = "softprompt_api.registry.v1.RegistryService/ReadTensors"

_WEAK_DURABILITY = (
    "the registry was started with --durability weak: what it has acknowledged may be lost when its store ends"
)

Outcome = TypeVar("Outcome")
Context = grpc.aio.ServicerContext[Any, Any]


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Serve a Registry.

    Args:
        is_durable: whether the store keeps what was acknowledged; where it may not, new versions have a warning.
        tracer: traces each file that is read; None: nobody does.
    """

    def __init__(self, registry: Registry, *, is_durable: bool, tracer: Tracer | None = None) -> None:
        self._registry = registry
        self._tracer = tracer
        self._warnings = () if is_durable else (_WEAK_DURABILITY,)

    async def RegisterAdapter(
        self, request_iterator: AsyncIterator[pb.RegisterAdapterRequest], context: Context
    ) -> pb.RegisterAdapterResponse:
        requests = aiter(request_iterator)
        async with _taken_whole(requests):
            first = await anext(requests, pb.RegisterAdapterRequest())
            with audited("adapter.register", adapter=shown(first.header.name, _MAX_SHOWN), peer=context.peer()):
                if first.WhichOneof("part") != "header":
                    raise InvalidArgument("the first message of an upload must be its header", field="header")
                version = await self._settled(
                    self._registry.uploads.register(registration_from(first.header), _pieces(requests))
                )
        return pb.RegisterAdapterResponse(
            adapter=version_to(version), warnings=(*version.warnings, *self._warnings)
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        return pb.GetAdapterResponse(adapter=version_to(await self._registry.get(request.adapter)))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        listing = await self._registry.list_adapters(
            size=request.page_size,
            token=request.page_token,
            prefix=request.name_prefix,
            all_tenants=request.all_tenants,
            labels=request.labels,
            descending=request.descending,
        )
        return pb.ListAdaptersResponse(
            adapters=[version_to(version) for version in listing.page.items],
            next_page_token=listing.page.next_token,
            cursor=listing.cursor,
            total_size=listing.total,
        )

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        page = await self._registry.list_versions(request.name, size=request.page_size, token=request.page_token)
        versions = [version_to(version) for version in page.items]
        return pb.ListVersionsResponse(versions=versions, next_page_token=page.next_token)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        expected = request.expected_version if request.HasField("expected_version") else None
        action, alias = "alias.set" if request.version else "alias.remove", shown(request.alias, _MAX_SHOWN)
        with audited(action, adapter=shown(request.name, _MAX_SHOWN), alias=alias, peer=context.peer()) as facts:
            facts["version"] = request.version
            version = await self._settled(
                self._registry.set_alias(request.name, request.alias, request.version, expected=expected)
            )
        return pb.SetAliasResponse(adapter=version_to(version) if version else None)

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, context: Context) -> pb.UpdateAdapterResponse:
        with audited("adapter.update", adapter=shown(request.adapter, _MAX_SHOWN), peer=context.peer()):
            version = await self._registry.update(request.adapter, update_from(request))
        return pb.UpdateAdapterResponse(adapter=version_to(version))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:
        with audited("adapter.delete", adapter=shown(request.name, _MAX_SHOWN), peer=context.peer()):
            num_deleted = await self._settled(self._registry.delete_adapter(request.name))
        return pb.DeleteAdapterResponse(deleted_versions=num_deleted)

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: Context) -> pb.DeleteVersionResponse:
        with audited(
            "adapter.delete", adapter=shown(f"{request.name}@{request.version}", _MAX_SHOWN), peer=context.peer()
        ):
            await self._settled(self._registry.delete_version(request.name, request.version))
        return pb.DeleteVersionResponse()

    async def ReadTensors(
        self, request_iterator: AsyncIterator[pb.ReadTensorsRequest], context: Context
    ) -> AsyncIterator[pb.ReadTensorsResponse]:
        async for request in self._registry.stopping.through(aiter(request_iterator)):
            enter_call(request.context.items())
            with serve_call(self._tracer, _READ_TENSORS, request.context):
                async for response in self._read(request):
                    yield response

    async def _read(self, request: pb.ReadTensorsRequest) -> AsyncIterator[pb.ReadTensorsResponse]:
        is_first = True
        if not request.adapter:
            reading = self._registry.read(
                request.digest, offset=request.offset, base_model_id=request.base_model_id
            )
        elif request.digest or request.offset or request.base_model_id:
            raise InvalidArgument("goes without a digest, an offset or a base model's id", field="adapter")
        else:
            reading = self._registry.read_named(request.adapter, up_to_bytes=SMALL_FILE_BYTES)
        async for version, piece in reading:
            chunk = pb.Chunk(offset=piece.offset, data=piece.data)
            yield pb.ReadTensorsResponse(
                chunk=chunk, size_bytes=version.size_bytes, adapter=version_to(version) if is_first else None
            )
            is_first = False

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        async for change in self._registry.watching.watch(request.cursor):
            yield change_to(change)

    async def HoldLease(
        self, request_iterator: AsyncIterator[pb.HoldLeaseRequest], context: Context
    ) -> AsyncIterator[pb.HoldLeaseResponse]:
        async for lease_s in self._registry.leases.hold(_cursors(request_iterator)):
            yield pb.HoldLeaseResponse(lease_ms=int(lease_s * 1000))

    async def PutBaseModel(self, request: pb.PutBaseModelRequest, context: Context) -> pb.PutBaseModelResponse:
        await self._registry.put_base_model(base_model_from(request.base_model))
        return pb.PutBaseModelResponse()

    async def ListBaseModels(
        self, request: pb.ListBaseModelsRequest, context: Context
    ) -> pb.ListBaseModelsResponse:
        models = await self._registry.base_models()
        return pb.ListBaseModelsResponse(base_models=[base_model_to(model) for model in models])

    async def RecordProbe(self, request: pb.RecordProbeRequest, context: Context) -> pb.RecordProbeResponse:
        request.probe.ClearField("probed_at")
        version = await self._registry.record_probe(request.adapter, request.digest, probe_from(request.probe))
        return pb.RecordProbeResponse(adapter=version_to(version))

    async def ImportAdapter(self, request: pb.ImportAdapterRequest, context: Context) -> pb.ImportAdapterResponse:
        with audited(
            "adapter.import",
            adapter=shown(request.name, _MAX_SHOWN),
            source=shown(request.source, _MAX_SHOWN),
            peer=context.peer(),
        ):
            version = await self._settled(self._registry.imports.run(import_from(request)))
        return pb.ImportAdapterResponse(adapter=version_to(version), warnings=(*version.warnings, *self._warnings))

    async def _settled(self, change: Awaitable[Outcome]) -> Outcome:
        """What became of a change of what names stand for, once nobody answers from before it.

        Nor from before another one that it was refused for: the same, asked for a second time, perhaps.
        """
        try:
            outcome = await change
        except (AdapterNotFound, AdapterConflict, AliasMoved):
            await self._registry.leases.settle()
            raise
        try:
            await self._registry.leases.settle()
        except Unavailable as error:
            raise Unavailable(
                "the change was made, and the store went away before every gateway knew of it; "
                "ask what there is now"
            ) from error
        return outcome


@asynccontextmanager
async def _taken_whole(requests: AsyncIterator[pb.RegisterAdapterRequest]) -> AsyncIterator[None]:
    """Take what the client still sends before it is answered early.

    An answer that arrives while gRPC's asyncio client writes is lost there, and the client sees an internal error.
    """
    try:
        yield
    except Exception:
        await _drain(requests)
        raise
    await _drain(requests)


async def _drain(requests: AsyncIterator[pb.RegisterAdapterRequest]) -> None:
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_MAX_DRAIN_S):
            while True:
                # A client that sends nothing is not writing, and can be answered.
                await asyncio.wait_for(anext(requests), _MAX_DRAIN_IDLE_S)


async def _cursors(requests: AsyncIterator[pb.HoldLeaseRequest]) -> AsyncIterator[str]:
    async for request in requests:
        yield request.cursor


async def _pieces(requests: AsyncIterator[pb.RegisterAdapterRequest]) -> AsyncIterator[Piece]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgument("after the header of an upload follow chunks alone", field="chunk")
        yield Piece(offset=request.chunk.offset, data=request.chunk.data)
