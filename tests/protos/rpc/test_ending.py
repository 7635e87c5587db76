"""What a server ended a call with stays known, also where a write fails after it."""

from collections.abc import AsyncIterator

import grpc
import pytest
from softprompt_api.errors import AdapterInvalid, InternalError, SoftpromptError
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.ending import Ending
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.status import from_rpc_error

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    """Ends every registration with its error, if it has one."""

    error: Exception | None = None

    async def RegisterAdapter(self, request_iterator, context):  # noqa: N802
        if self.error is not None:
            raise self.error
        return pb.RegisterAdapterResponse()


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def stub(servicer) -> AsyncIterator:
    server = ServiceServer("127.0.0.1:0", [SERVICE])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server.server)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield registry_pb2_grpc.RegistryServiceStub(channel)
    await server.stop(0)


def fail_a_write(call: grpc.aio.Call) -> None:
    """What grpc.aio does when a write finds the call ended (grpc/_cython/_cygrpc/aio/call.pyx.pxi)."""
    call._cython_call.set_internal_error('Failed "execute_batch": (SendMessageOperation,)')


async def error_of(call: grpc.aio.StreamUnaryCall, ending: Ending) -> tuple[SoftpromptError, SoftpromptError]:
    """What the call raises, and what its ending tells."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return from_rpc_error(failed.value), from_rpc_error(ending.of(failed.value))


async def test_a_failed_write_does_not_hide_what_the_server_said(servicer, stub):
    servicer.error = AdapterInvalid("no such type", field="config.peft_type", details={"found": "LOHA"})
    call = stub.RegisterAdapter()
    ending = Ending(call)
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    fail_a_write(call)
    raised, told = await error_of(call, ending)
    assert type(raised) is InternalError
    assert type(told) is AdapterInvalid
    assert (told.message, told.field, told.details) == ("no such type", "config.peft_type", {"found": "LOHA"})


async def test_an_error_that_nothing_hides_is_the_calls_own(servicer, stub):
    servicer.error = AdapterInvalid("no such type", field="config.peft_type")
    call = stub.RegisterAdapter()
    ending = Ending(call)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert ending.of(failed.value) is failed.value


async def test_a_defect_of_the_server_stays_internal(servicer, stub):
    servicer.error = ZeroDivisionError()
    call = stub.RegisterAdapter()
    ending = Ending(call)
    assert await call.code() is grpc.StatusCode.INTERNAL
    fail_a_write(call)
    raised, told = await error_of(call, ending)
    assert type(raised) is type(told) is InternalError


async def test_a_call_that_went_well_has_no_error_to_remember(stub):
    call = stub.RegisterAdapter()
    ending = Ending(call)
    assert await call.code() is grpc.StatusCode.OK
    fail_a_write(call)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call._raise_for_status()
    assert ending.of(failed.value) is failed.value
