"""A request's id travels with the calls that are made for it, into the log lines of whoever answers them."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import Context

import pytest
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.context import ask, enter_call, enter_request, outgoing
from softprompt_api.rpc.server import ServiceServer
from structlog.contextvars import get_contextvars

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


class Servicer(registry_pb2_grpc.RegistryServiceServicer):
    """Answers with what its log lines would have."""

    async def GetAdapter(self, request, context):  # noqa: N802
        return pb.GetAdapterResponse(adapter=pb.AdapterVersion(name=told()))

    async def ReadTensors(self, request_iterator, context):  # noqa: N802
        yield pb.ReadTensorsResponse(adapter=pb.AdapterVersion(name=told()))


def told() -> str:
    return str(get_contextvars().get("request_id", "none"))


@pytest.fixture
async def stub() -> AsyncIterator:
    server = ServiceServer("127.0.0.1:0", [SERVICE])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(Servicer(), server.server)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield registry_pb2_grpc.RegistryServiceStub(channel)
    await server.stop(0)


async def id_there(stub, request_id: str = "") -> str:
    """What a server's log lines have for a call that is made for a request."""
    if request_id:
        enter_request(request_id)
    answer = await ask(stub.GetAdapter, pb.GetAdapterRequest(), timeout_s=10)
    return answer.adapter.name


async def test_each_call_brings_the_id_of_its_own_request(stub):
    # Each in a task of its own, as requests are.
    ids = [f"request-{number}" for number in range(20)]
    assert await asyncio.gather(*(id_there(stub, one) for one in ids)) == ids
    assert await id_there(stub) == "none"


async def test_a_stream_brings_it_too(stub):
    async def read() -> list[str]:
        enter_request("request-1")
        call = stub.ReadTensors([], metadata=outgoing())
        return [response.adapter.name async for response in call]

    assert await asyncio.create_task(read()) == ["request-1"]


@pytest.mark.parametrize("odd", ["", "a b", "é", "x" * 129, "a\nb"])
async def test_what_is_no_id_neither_goes_out_nor_comes_in(stub, odd):
    assert await asyncio.create_task(id_there(stub, odd)) == "none"

    async def enter() -> str:
        enter_call([("x-request-id", odd), ("x-request-id", b"bytes"), ("other", "value")])
        return told()

    assert await asyncio.create_task(enter()) == "none"


async def test_what_is_asked_over_a_stream_is_for_its_own_request_alone():
    async def over_a_stream() -> list[tuple[str, object]]:
        seen = []
        for context in ({"x-request-id": "request-1"}, {}, {"x-request-id": "request-2"}):
            enter_call(context.items())
            seen.append((told(), outgoing()))
        return seen

    ids = ["request-1", "none", "request-2"]
    told_to_others = [((("x-request-id", one),) if one != "none" else ()) for one in ids]
    assert await asyncio.create_task(over_a_stream()) == list(zip(ids, told_to_others, strict=True))


def test_without_a_request_nothing_goes_out():
    assert Context().run(outgoing) == ()
