"""What every server has: errors as statuses, health, reflection, a graceful stop."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from softprompt_api.errors import AdapterNotFound, InternalError, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.probe import is_serving
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.status import from_rpc_error

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    """Behaves as its requests say."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.released = asyncio.Event()

    async def GetAdapter(self, request, context):  # noqa: N802
        self.started.set()
        if request.adapter == "wait":
            await self.released.wait()
        if request.adapter == "missing":
            raise AdapterNotFound("there is no adapter 'missing'", field="adapter")
        if request.adapter == "broken":
            raise ZeroDivisionError("/secret/path")
        return pb.GetAdapterResponse(adapter=pb.AdapterVersion(name=request.adapter))

    async def RegisterAdapter(self, request_iterator, context):  # noqa: N802
        return pb.RegisterAdapterResponse(warnings=[str(sum([1 async for _ in request_iterator]))])

    async def ReadTensors(self, request_iterator, context):  # noqa: N802
        async for request in request_iterator:
            yield pb.ReadTensorsResponse(size_bytes=1)
            if request.digest == "broken":
                raise ZeroDivisionError("/secret/path")
            raise AdapterNotFound("it went away")


async def forever(call) -> None:
    """Repeat a call until it raises."""
    while True:
        await call()


@pytest.fixture
async def server() -> AsyncIterator[ServiceServer]:
    server = ServiceServer("127.0.0.1:0", [SERVICE])
    server.servicer = Servicer()
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(server.servicer, server.server)
    await server.start()
    yield server
    await server.stop(0)


@pytest.fixture
async def channel(server) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return registry_pb2_grpc.RegistryServiceStub(channel)


async def test_an_error_of_ours_reaches_the_client_whole(stub):
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GetAdapter(pb.GetAdapterRequest(adapter="missing"))
    error = from_rpc_error(failed.value)
    assert type(error) is AdapterNotFound
    assert (error.message, error.field) == ("there is no adapter 'missing'", "adapter")


async def test_a_defect_reaches_the_client_without_its_text(stub):
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GetAdapter(pb.GetAdapterRequest(adapter="broken"))
    assert type(from_rpc_error(failed.value)) is InternalError
    assert "secret" not in (failed.value.details() or "")
    assert (await stub.GetAdapter(pb.GetAdapterRequest(adapter="fine"))).adapter.name == "fine"


@pytest.mark.parametrize(("digest", "leaf"), [("", AdapterNotFound), ("broken", InternalError)])
async def test_an_error_in_a_stream_comes_after_what_was_sent(stub, digest, leaf):
    call = stub.ReadTensors([pb.ReadTensorsRequest(digest=digest)])
    assert (await call.read()).size_bytes == 1
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    assert type(from_rpc_error(failed.value)) is leaf


async def test_health_is_told_for_the_server_and_the_service(server, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for is_up in (True, False, True):
        await server.set_serving(is_up)
        for service in ("", SERVICE.full_name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert (answer.status == health_pb2.HealthCheckResponse.SERVING) == is_up
        assert await asyncio.to_thread(is_serving, f"127.0.0.1:{server.port}") == is_up


async def test_health_can_be_watched(server, channel):
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
    changes = aiter(watch)
    assert (await anext(changes)).status == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    assert (await anext(changes)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_nobody_there_is_not_serving():
    assert not await asyncio.to_thread(is_serving, "127.0.0.1:1", 0.5)


async def test_reflection_lists_the_service(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request])):
        assert SERVICE.full_name in {service.name for service in response.list_services_response.service}


async def test_a_taken_port_is_said(server):
    other = ServiceServer(f"127.0.0.1:{server.port}", [SERVICE])
    with pytest.raises(OSError, match="is another service running there"):
        await other.start()


async def test_stopping_lets_running_calls_end_and_takes_no_new_ones(server, channel, stub):
    running = asyncio.ensure_future(stub.GetAdapter(pb.GetAdapterRequest(adapter="wait")))
    await server.servicer.started.wait()
    stopping = asyncio.create_task(server.stop(10))
    health = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await forever(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=5))
    # gRPC says CANCELLED to a call that arrives in the very moment of the stop, and UNAVAILABLE afterwards.
    assert type(from_rpc_error(refused.value)) is Unavailable
    server.servicer.released.set()
    assert (await running).adapter.name == "wait"
    await stopping


async def test_the_grace_ends(server, stub):
    running = asyncio.ensure_future(stub.GetAdapter(pb.GetAdapterRequest(adapter="wait")))
    await server.servicer.started.wait()
    await server.stop(0.1)
    with pytest.raises(grpc.aio.AioRpcError):
        await running


@pytest.mark.parametrize(
    ("kind", "method"),
    [("unary_unary", "GetAdapter"), ("stream_stream", "ReadTensors"), ("stream_unary", "RegisterAdapter")],
)
async def test_bytes_that_are_no_message_are_refused_without_a_word_of_the_parser(channel, kind, method):
    call = getattr(channel, kind)(f"/{SERVICE.full_name}/{method}")
    garbage = b"\xff\xff\xff not protobuf"
    answer = call(iter([garbage]) if kind.startswith("stream") else garbage)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (answer.read() if kind.endswith("stream") else answer)
    assert (from_rpc_error(refused.value).reason, refused.value.code().name) == ("INVALID_ARGUMENT",) * 2
    assert "Error" not in refused.value.details()
