"""A new channel finds out for itself whether a service is there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.server import ServiceServer

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


async def status(channel: grpc.aio.Channel) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return answer.status


async def test_a_new_channel_reaches_a_service_that_an_older_one_did_not(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/socket"
    async with open_channel(target) as older, open_channel(target) as newer:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await status(older)
        server = ServiceServer(target, [SERVICE])
        await server.start()
        try:
            assert await status(newer) == health_pb2.HealthCheckResponse.SERVING
        finally:
            await server.stop(0)


PIECE_BYTES, NUM_PIECES = 2**18, 64


class Files(registry_pb2_grpc.RegistryServiceServicer):
    """Sends a file in pieces, as far as it may."""

    def __init__(self) -> None:
        self.num_sent = 0

    async def ReadTensors(  # noqa: N802 - gRPC names it
        self, request_iterator: AsyncIterator[pb.ReadTensorsRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ReadTensorsResponse]:
        async for _ in request_iterator:
            for _ in range(NUM_PIECES):
                yield pb.ReadTensorsResponse(chunk=pb.Chunk(data=bytes(PIECE_BYTES)))
                self.num_sent += 1


async def test_with_a_short_window_nothing_much_is_sent_ahead_of_who_reads(tmp_path: Path) -> None:
    files, server = Files(), ServiceServer(f"unix:{tmp_path}/socket", [SERVICE])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(files, server.server)
    await server.start()
    async with open_channel(f"unix:{tmp_path}/socket", short_window=True) as channel:
        call = registry_pb2_grpc.RegistryServiceStub(channel).ReadTensors()
        await call.write(pb.ReadTensorsRequest())
        for num_read in range(1, NUM_PIECES + 1):
            assert len((await call.read()).chunk.data) == PIECE_BYTES
            await status(channel)  # who could send more has had the time for it
            assert files.num_sent - num_read <= 3
        call.cancel()
    await server.stop(0)
