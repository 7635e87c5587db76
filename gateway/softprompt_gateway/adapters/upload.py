"""Carry a tensor file from an HTTP body to the registry, a piece at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from softprompt_api.errors import InvalidArgument
from softprompt_api.registry.v1.registry_pb2 import (
    Chunk,
    RegisterAdapterHeader,
    RegisterAdapterRequest,
    RegisterAdapterResponse,
)
from softprompt_api.rpc.channel import CHUNK_BYTES
from softprompt_api.rpc.ending import Ending

from softprompt_gateway.clients import RegistryClient, UploadCall


async def register(
    registry: RegistryClient, header: RegisterAdapterHeader, data: AsyncIterator[bytes]
) -> RegisterAdapterResponse:
    """Register an adapter whose tensors arrive as `data`, cut anyhow; only one chunk is held at a time.

    If `data` fails (the client left, sent too much, took too long) the registration is cancelled, and nothing was
    registered. If the registry breaks off, its error is raised and the rest of `data` is left unread.
    """
    call = registry.open_upload()
    ending = Ending(call)
    try:
        # A write to a call that the registry has ended fails; the call itself then tells why.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await _write(call, header, data)
        return await registry.finish_upload(call, ending)
    finally:
        call.cancel()


async def _write(call: UploadCall, header: RegisterAdapterHeader, data: AsyncIterator[bytes]) -> None:
    await call.write(RegisterAdapterRequest(header=header))
    offset = 0
    async for piece in in_chunks(data, CHUNK_BYTES):
        await call.write(RegisterAdapterRequest(chunk=Chunk(offset=offset, data=piece)))
        offset += len(piece)
    if offset != header.tensors_size_bytes:
        raise InvalidArgument(
            f"the body has {offset} bytes, not the {header.tensors_size_bytes} declared", field="content-length"
        )
    await call.done_writing()


async def in_chunks(data: AsyncIterator[bytes], size_bytes: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of exactly this size, but for the last."""
    held = bytearray()
    async for piece in data:
        held += piece
        while len(held) >= size_bytes:
            yield bytes(held[:size_bytes])
            del held[:size_bytes]
    if held:
        yield bytes(held)


async def whole(data: bytes) -> AsyncIterator[bytes]:
    """Bytes that are here already, as a stream of one piece."""
    yield data
