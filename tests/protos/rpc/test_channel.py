"""A new channel finds out for itself whether a service is there."""

from pathlib import Path

import grpc
import pytest
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.server import ServiceServer

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    async def DeleteAdapter(self, request, context):  # noqa: N802
        return pb.DeleteAdapterResponse(deleted_versions=1)


async def delete(channel: grpc.aio.Channel) -> pb.DeleteAdapterResponse:
    return await registry_pb2_grpc.RegistryServiceStub(channel).DeleteAdapter(pb.DeleteAdapterRequest(name="a"))


async def test_a_new_channel_reaches_a_service_that_an_older_one_did_not(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/socket"
    async with open_channel(target) as older, open_channel(target) as newer:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await delete(older)
        server = ServiceServer(target, [SERVICE])
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(Servicer(), server.server)
        await server.start()
        try:
            assert (await delete(newer)).deleted_versions == 1
        finally:
            await server.stop(0)
