"""The registry learns of the base model when it comes, and again when it has forgotten."""

# gRPC names the methods.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from softprompt_api.errors import Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.server import ServiceServer
from softprompt_inference import announce
from softprompt_inference.announce import Announcer

BASE_MODEL = pb.BaseModel(id="org/Base", hidden_size=8)


class FakeRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """Counts what it is told; refuses the first few."""

    def __init__(self, num_refusals: int = 0) -> None:
        self.told: list[pb.BaseModel] = []
        self._num_refusals = num_refusals
        self._changed = asyncio.Event()

    async def PutBaseModel(
        self, request: pb.PutBaseModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PutBaseModelResponse:
        if self._num_refusals:
            self._num_refusals -= 1
            raise Unavailable("the store is away")
        self.told.append(request.base_model)
        self._changed.set()
        return pb.PutBaseModelResponse()

    async def wait_until_told(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.told) < times:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "RETRY_S", 0.01)


@pytest.fixture
def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number: int = taken.getsockname()[1]
        return number


@pytest.fixture
async def announcer(port: int) -> AsyncIterator[Announcer]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        announcer = Announcer(registry_pb2_grpc.RegistryServiceStub(channel), BASE_MODEL, interval_s=0.02)
        running = asyncio.create_task(announcer.run())
        yield announcer
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@asynccontextmanager
async def serving(registry: FakeRegistry, port: int) -> AsyncIterator[None]:
    server = ServiceServer(f"127.0.0.1:{port}", [pb.DESCRIPTOR.services_by_name["RegistryService"]])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.server)
    await server.start()
    yield
    await server.stop(0)


async def test_a_registry_that_comes_late_is_told(announcer: Announcer, port: int) -> None:
    registry = FakeRegistry()
    assert not announcer.announced.is_set()
    async with serving(registry, port):
        await asyncio.wait_for(announcer.announced.wait(), 10)
    assert registry.told[0] == BASE_MODEL


async def test_a_registry_that_cannot_take_it_yet_is_told_again(announcer: Announcer, port: int) -> None:
    async with serving(FakeRegistry(num_refusals=5), port):
        await asyncio.wait_for(announcer.announced.wait(), 10)


async def test_a_registry_is_told_again_and_again_and_so_is_the_next_one(announcer: Announcer, port: int) -> None:
    first, second = FakeRegistry(), FakeRegistry()
    async with serving(first, port):
        await first.wait_until_told(3)
    async with serving(second, port):
        await second.wait_until_told(2)
