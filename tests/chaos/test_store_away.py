"""The store goes away in every way a link can fail, and comes back: nothing is lost, and nobody has to help."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.errors import Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb

pytestmark = pytest.mark.timeout(600)
# What one call may take while the store is away: its timeout of a second, for the few commands that it may begin.
_MAX_CALL_S = 4.0


@pytest.mark.parametrize("away_s", [0.0, pytest.param(60.0, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("fault", ["cut", "half-open", "too slow"])
async def test_a_store_that_was_away_is_found_again(
    make_store: Any,
    serve: Any,
    connect: Any,
    store_link: Any,
    look_into: Any,
    adapter: Any,
    eventually: Any,
    fault: str,
    away_s: float,
) -> None:
    store = make_store()
    link = await store_link(store)
    client = connect(f"127.0.0.1:{(await serve(link.url)).port}")
    health = health_pb2_grpc.HealthStub(client.channel)

    async def is_serving() -> bool:
        answer = await health.Check(health_pb2.HealthCheckRequest())
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def is_away() -> bool:
        return not await is_serving()

    await client.put_base_model()
    first = await client.register("first", adapter(1))
    cursor = (await client.answer(client.stub.ListAdapters(pb.ListAdaptersRequest()))).cursor
    link.fault = fault
    until = time.monotonic() + away_s
    await eventually(is_away)
    while True:
        for call in (
            client.get("first"),
            client.register("second", adapter(2)),
            client.set_alias("first", "prod", 1),
        ):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await call
            assert time.monotonic() - began < _MAX_CALL_S
        if time.monotonic() > until:
            break
    link.fault = ""
    await eventually(is_serving)
    assert await client.get("first") == first
    # What was refused was not done behind the client's back, or was done whole.
    assert set(await client.names()) <= {"first", "second"}
    third = await client.register("third", adapter(3))
    assert await client.read(third.digest) == adapter(3).tensors
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=cursor), timeout=20)
    told = ""
    while told != "third":
        told = (await call.read()).adapter.name
    call.cancel()
    look = look_into(store)
    assert all([await look.ttl(key) > 0 for key in await look.keys("*:u:*")])


async def test_a_slow_store_is_slow_and_nothing_else(
    make_store: Any, serve: Any, connect: Any, store_link: Any, adapter: Any
) -> None:
    store = make_store()
    link = await store_link(store)
    client = connect(f"127.0.0.1:{(await serve(link.url)).port}")
    await client.put_base_model()
    link.fault = "slow"
    made = await asyncio.gather(*(client.register("a", adapter(seed)) for seed in range(4)))
    assert sorted(version.version for version in made) == [1, 2, 3, 4]
    for seed, version in enumerate(made):
        assert await client.read(version.digest) == adapter(seed).tensors


async def test_a_watch_that_the_store_left_ends_and_goes_on_from_its_cursor(
    make_store: Any, serve: Any, connect: Any, store_link: Any, adapter: Any, eventually: Any
) -> None:
    store = make_store()
    link = await store_link(store)
    client = connect(f"127.0.0.1:{(await serve(link.url)).port}")
    await client.put_base_model()
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(), timeout=20)
    cursor = (await call.read()).cursor
    link.fault = "half-open"

    async def read_on() -> None:
        while True:
            await call.read()

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await read_on()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    link.fault = ""

    async def is_back() -> bool:
        try:
            return bool(await client.register("a", adapter(1)))
        except Unavailable:
            return False

    await eventually(is_back)
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=cursor), timeout=20)
    assert (await call.read()).type == pb.ADAPTER_EVENT_TYPE_HEARTBEAT
    assert (await call.read()).adapter.name == "a"
    call.cancel()
