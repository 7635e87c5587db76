"""A new channel finds out for itself whether a service is there."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.registry.v1 import registry_pb2 as pb
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
