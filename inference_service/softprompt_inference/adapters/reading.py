"""Tensor files from the registry, over streams that stay open: to begin a call takes longer than a small file."""

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc
from softprompt_api.errors import DataCorrupted, InternalError, SoftpromptError, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc as pb_grpc
from softprompt_api.rpc.context import outgoing
from softprompt_api.rpc.ending import Ending
from softprompt_api.rpc.status import from_rpc_error

_MAX_KEPT = 4
# gRPC announces that a connection of some age ends, and lets calls on it end: later files belong on another.
_MAX_AGE_S = 600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor file.

    Attributes:
        version: what the file is of; in the first piece alone.
    """

    offset: int
    data: bytes
    version: pb.AdapterVersion | None


class TensorReader:
    """Reads tensor files, each over a stream of its own; the stream is kept for the next one."""

    def __init__(self, stub: "pb_grpc.RegistryServiceAsyncStub") -> None:
        self._stub = stub
        self._kept: list[_Stream] = []

    async def read(self, digest: str, *, offset: int, base_model_id: str) -> AsyncGenerator[Piece, None]:
        """A version's file from an offset, in pieces; to be closed where not all of them are taken.

        Raises:
            Unavailable: the link broke, or the registry cannot be reached, or its store.
            SoftpromptError: whatever else the registry says; DataCorrupted where it cannot be understood.
        """
        request = pb.ReadTensorsRequest(digest=digest, offset=offset, base_model_id=base_model_id)
        async with self._asked(request) as stream:
            while not stream.is_answered:
                response = await stream.answer()
                chunk, version = response.chunk, response.adapter if response.HasField("adapter") else None
                stream.is_answered = chunk.offset + len(chunk.data) >= response.size_bytes
                yield Piece(offset=chunk.offset, data=chunk.data, version=version)

    async def look_up(self, name: str) -> tuple[pb.AdapterVersion, bytes]:
        """The version that a name stands for now, and its file where that is small; no bytes of a larger one.

        Raises as `read`.
        """
        async with self._asked(pb.ReadTensorsRequest(adapter=name)) as stream:
            response = await stream.answer()
            stream.is_answered = True
        version, data = response.adapter, response.chunk.data
        if not version.digest or (data and len(data) != version.size_bytes):
            raise DataCorrupted("the registry did not say which version a name stands for, or sent another file")
        return version, data

    @asynccontextmanager
    async def _asked(self, request: pb.ReadTensorsRequest) -> AsyncIterator["_Stream"]:
        """A stream that was asked; it is kept where it `is_answered`."""
        stream = self._take_kept() or self._open()
        stream.is_answered = False
        request.context.update(outgoing())
        try:
            await stream.ask(request)
            yield stream
        finally:
            if stream.is_answered and len(self._kept) < _MAX_KEPT:
                self._kept.append(stream)
            else:
                stream.call.cancel()

    def _take_kept(self) -> "_Stream | None":
        while self._kept:
            stream = self._kept.pop()
            if stream.is_usable:
                return stream
            stream.call.cancel()
        return None

    def _open(self) -> "_Stream":
        # In a context of its own: it is not only for the request that happens to be first.
        return _Stream(contextvars.Context().run(self._stub.ReadTensors))


@dataclass(eq=False, slots=True)
class _Stream:
    call: "grpc.aio.StreamStreamCall[pb.ReadTensorsRequest, pb.ReadTensorsResponse]"
    ending: Ending = field(init=False)
    usable_until_s: float = field(init=False)
    is_answered: bool = True  # whole

    def __post_init__(self) -> None:
        self.ending = Ending(self.call)
        self.usable_until_s = time.monotonic() + _MAX_AGE_S

    @property
    def is_usable(self) -> bool:
        return not self.call.done() and time.monotonic() < self.usable_until_s

    async def ask(self, request: pb.ReadTensorsRequest) -> None:
        try:
            await self.call.write(request)
        except asyncio.InvalidStateError:
            pass  # it has ended, and its answer tells why
        except grpc.aio.AioRpcError as error:
            raise translated(self.ending.of(error)) from error

    async def answer(self) -> pb.ReadTensorsResponse:
        try:
            response = await self.call.read()
        except grpc.aio.AioRpcError as error:
            raise translated(self.ending.of(error)) from error
        if response is grpc.aio.EOF:
            raise Unavailable("the adapter registry ended the transfer; try again later")
        return readable(cast("pb.ReadTensorsResponse | None", response))


def readable(message: T | None) -> T:
    """The message; grpc.aio hands out None for one that it cannot parse."""
    if message is None:
        raise DataCorrupted("the registry's answer cannot be read")
    return message


def translated(error: grpc.aio.AioRpcError) -> SoftpromptError:
    """What a failed call to the registry means to our own caller, without the registry's address."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unavailable("the adapter registry cannot be reached; try again later")
    told = from_rpc_error(error)
    if isinstance(told, InternalError):
        return InternalError("the adapter registry failed; its log has the details")
    return told
