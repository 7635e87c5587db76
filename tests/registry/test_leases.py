"""Leases: nobody answers from before a change that was acknowledged."""

import asyncio
import time
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock

import grpc
import pytest
import redis.exceptions as redis_errors
from softprompt_api.errors import AdapterNotFound, AliasMoved, InvalidArgument, Overloaded, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.status import from_rpc_error
from softprompt_registry.claim import Claim
from softprompt_registry.events import EventLog
from softprompt_registry.leases import Leases
from softprompt_registry.server import RegistryServer
from softprompt_registry.stopping import Stopping

LONG_S = 60.0
SHORT_S = 0.3
# What is not waited for has happened after so many other calls.
NUM_OTHER_CALLS = 20


class Holder:
    """Asks for a lease over a stream of its own."""

    def __init__(self, client) -> None:
        self._client = client
        self._call = client.stub.HoldLease()

    async def ask(self, cursor: str | None = None) -> float:
        """For how many seconds it has one, having taken all there is or what is before a cursor."""
        if cursor is None:
            cursor = await newest(self._client)
        try:
            async with asyncio.timeout(10):
                await self._call.write(pb.HoldLeaseRequest(cursor=cursor))
                answer = await self._call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        assert isinstance(answer, pb.HoldLeaseResponse)
        return answer.lease_ms / 1000

    async def give_back(self) -> None:
        assert await self.ask("") == 0

    async def end(self) -> None:
        """End the stream in order."""
        async with asyncio.timeout(10):
            await self._call.done_writing()
            assert await self._call.read() is grpc.aio.EOF

    def leave(self) -> None:
        """As if its process had been killed."""
        self._call.cancel()


async def newest(client) -> str:
    """The cursor of the newest change."""
    return (await client.stub.ListAdapters(pb.ListAdaptersRequest())).cursor


@pytest.fixture
def lease_s() -> float:
    return LONG_S


@pytest.fixture
def settings(settings, lease_s):
    return settings.model_copy(update={"lease_s": lease_s})


@asynccontextmanager
async def another(settings, connect, **changes):
    """A client of one more registry over the settings' store."""
    async with RegistryServer(settings.model_copy(update=changes)) as server:
        client = connect(server.port)
        yield client
        await client.channel.close()


async def held_up(client, change) -> asyncio.Task:
    """A change that is made, and not acknowledged."""
    before = await newest(client)
    task = asyncio.create_task(change)
    async with asyncio.timeout(10):
        while await newest(client) == before:
            pass
    for _ in range(NUM_OTHER_CALLS):
        await newest(client)
    assert not task.done()
    return task


async def test_a_lease_is_given_to_who_has_taken_every_change(client, make_adapter):
    holder = Holder(client)
    before = await newest(client)
    assert await holder.ask(before) == LONG_S
    await holder.give_back()
    await client.register("tweets", make_adapter())
    holder = Holder(client)
    assert await holder.ask(before) == 0
    assert await holder.ask("9999999999999-0") == 0  # of another store
    assert await holder.ask() == LONG_S
    await holder.give_back()


async def test_changes_of_what_names_stand_for_wait_for_holders(client, make_adapter):
    for seed in (1, 2, 3):
        await client.register("tweets", make_adapter(seed))
    holders = [Holder(client) for _ in "ab"]
    for change in (
        lambda: client.register("tweets", make_adapter(4)),
        lambda: client.set_alias("tweets", "prod", 1),
        lambda: client.set_alias("tweets", "prod", 0),
        lambda: client.delete("tweets", 2),
        lambda: client.delete("tweets"),
    ):
        for holder in holders:
            assert await holder.ask() == LONG_S
        task = await held_up(client, change())
        await holders[0].ask()
        for _ in range(NUM_OTHER_CALLS):
            await newest(client)
        assert not task.done()  # one of them is not enough
        await holders[1].ask()
        async with asyncio.timeout(10):
            await task


async def test_who_is_refused_because_of_a_change_is_told_once_it_has_been_taken(client, make_adapter):
    for seed in (1, 2):
        await client.register("tweets", make_adapter(seed))
    holder = Holder(client)
    for change, other in (
        (client.set_alias("tweets", "latest", 1), client.set_alias("tweets", "latest", 2, expected=2)),
        (client.delete("tweets"), client.delete("tweets")),
    ):
        await holder.ask()
        first = await held_up(client, change)
        again = asyncio.create_task(other)
        for _ in range(NUM_OTHER_CALLS):
            await newest(client)
        assert not again.done()
        await holder.ask()
        async with asyncio.timeout(10):
            await first
            with pytest.raises((AliasMoved, AdapterNotFound)):
                await again


async def test_labels_and_pins_wait_for_nobody(client, make_adapter):
    await client.register("tweets", make_adapter())
    holder = Holder(client)
    await holder.ask()
    async with asyncio.timeout(10):
        await client.update("tweets", "pinned", pinned=True)


@pytest.mark.parametrize("lease_s", [SHORT_S])
@pytest.mark.parametrize("is_killed", [True, False])
async def test_who_is_gone_is_waited_for_until_its_lease_is_over(client, make_adapter, is_killed):
    holder = Holder(client)
    asked_s = time.monotonic()
    assert await holder.ask() == SHORT_S
    if is_killed:
        holder.leave()
    else:
        await holder.end()
    await client.register("tweets", make_adapter())
    assert time.monotonic() >= asked_s + SHORT_S


async def test_what_is_given_back_is_not_waited_for(client, make_adapter):
    holder = Holder(client)
    await holder.ask()
    await holder.give_back()
    async with asyncio.timeout(10):
        await client.register("tweets", make_adapter())


@pytest.mark.parametrize("lease_s", [SHORT_S])
async def test_who_does_not_take_a_change_does_not_keep_it_waiting(client, make_adapter):
    holder, begun = Holder(client), await newest(client)
    await holder.ask(begun)
    task = asyncio.create_task(client.register("tweets", make_adapter()))
    async with asyncio.timeout(10):
        while not task.done():
            await holder.ask(begun)


@pytest.mark.parametrize("lease_s", [0.0])
async def test_where_no_leases_are_wanted_none_is_given(client, make_adapter):
    holder = Holder(client)
    assert await holder.ask() == 0
    await client.register("tweets", make_adapter())


async def test_what_is_no_cursor_is_refused(client):
    with pytest.raises(InvalidArgument) as refused:
        await Holder(client).ask("x")
    assert refused.value.field == "cursor"


async def test_leases_are_bounded(settings, connect):
    async with another(settings, connect, max_watchers=2) as bounded:
        holders = [Holder(bounded) for _ in "ab"]
        for holder in holders:
            await holder.ask()
        with pytest.raises(Overloaded):
            await Holder(bounded).ask()
        await holders[0].give_back()
        assert await Holder(bounded).ask() == LONG_S
        await holders[1].ask()  # as often as it likes


async def test_a_stream_of_leases_ends_when_the_registry_stops(settings, connect):
    server = RegistryServer(settings)
    await server.start()
    client = connect(server.port)
    call = client.stub.HoldLease()
    await call.write(pb.HoldLeaseRequest(cursor=await newest(client)))
    await call.read()
    stopping = asyncio.create_task(server.stop())
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read()
    assert isinstance(from_rpc_error(ended.value), Unavailable)
    await stopping
    await client.channel.close()


@pytest.mark.parametrize("lease_s", [SHORT_S])
async def test_of_two_registries_none_acknowledges_what_the_others_holders_may_not_know(
    client, settings, connect, make_adapter
):
    async with another(settings, connect) as other:
        asked_s = time.monotonic()
        assert await Holder(client).ask() == SHORT_S
        await other.register("tweets", make_adapter())
        assert time.monotonic() >= asked_s + SHORT_S
        assert await Holder(client).ask() == 0  # it has learned of the other
        asked_s = time.monotonic()
        assert await Holder(other).ask() == SHORT_S  # which has not learned of it
        await client.register("tweets", make_adapter())
        assert time.monotonic() >= asked_s + SHORT_S
        assert await Holder(other).ask() == 0


@pytest.mark.parametrize("lease_s", [SHORT_S])
@pytest.mark.parametrize("is_claimed_before", [False, True])
async def test_after_a_registry_was_killed_changes_wait_for_its_holders(
    client, redis, make_adapter, is_claimed_before
):
    await redis.set("sp:leases", f"registry:killed:{2 * int(SHORT_S * 1000)}")
    begun_s = time.monotonic()
    if is_claimed_before:
        assert await Holder(client).ask() == SHORT_S
    await client.register("tweets", make_adapter())
    assert time.monotonic() >= begun_s + 2 * SHORT_S


async def test_a_claim_that_the_store_did_not_take_is_made_again(redis, monkeypatch):
    claim = Claim(redis, lease_s=LONG_S)
    with monkeypatch.context() as away:
        away.setattr(redis, "eval", AsyncMock(side_effect=redis_errors.ConnectionError("away")))
        with pytest.raises(Unavailable):
            await claim.holds()
    assert await claim.holds()


async def test_a_claim_that_has_gone_with_what_the_store_held_is_made_again(client, redis, make_adapter):
    holder = Holder(client)
    assert await holder.ask() == LONG_S
    await holder.give_back()
    await redis.flushall()
    holder = Holder(client)
    assert await holder.ask() == LONG_S
    assert (await redis.get("sp:leases")).startswith(b"registry:")


@pytest.mark.parametrize("lease_s", [SHORT_S])
async def test_a_registry_whose_neighbour_has_gone_gives_leases_again(
    client, settings, connect, redis, make_adapter
):
    async with another(settings, connect) as other:
        await redis.set("sp:leases", "registry:gone:1")
        holder = Holder(client)
        assert await holder.ask() == SHORT_S
        await holder.give_back()
        await other.register("tweets", make_adapter())
    assert await holder.ask() == 0
    assert 60 < await redis.ttl("sp:leases") <= 600  # the longest lease is over long before
    await redis.delete("sp:leases")
    assert await holder.ask() == SHORT_S


async def test_of_two_who_claim_at_once_the_later_one_waits_for_the_others_leases(redis, monkeypatch):
    claim = Claim(redis, lease_s=0.0)
    read = AsyncMock(side_effect=["", "registry:other:150"])
    with monkeypatch.context() as racing:
        racing.setattr(claim, "_read", read)
        await redis.set("sp:leases", "registry:other:150")
        begun_s = time.monotonic()
        assert await claim.holds()
    await claim.settle()
    assert time.monotonic() >= begun_s + 0.15


async def test_a_registry_that_stops_in_order_keeps_the_next_one_from_waiting(
    client, settings, connect, redis, make_adapter
):
    async with another(settings, connect) as first:
        holder = Holder(first)
        assert await holder.ask() == LONG_S
        await holder.give_back()
    assert await redis.get("sp:leases") is None
    async with asyncio.timeout(10):
        await client.register("tweets", make_adapter())


@pytest.mark.parametrize("left", ["held", "another's"])
async def test_a_registry_that_stops_leaves_the_claim_where_leases_may_be_held(settings, connect, redis, left):
    async with another(settings, connect) as client:
        holder = Holder(client)
        assert await holder.ask() == LONG_S
        if left == "another's":
            await holder.give_back()
            await redis.set("sp:leases", "registry:other:2000")
    assert await redis.get("sp:leases")


async def test_a_change_that_another_registry_makes_while_a_lease_is_claimed_is_looked_for(
    client, redis, make_adapter
):
    begun = await newest(client)

    class Claiming(Claim):
        async def holds(self) -> bool:
            await client.register("tweets", make_adapter())  # acknowledged: there is no claim yet
            return await super().holds()

    claim = Claiming(redis, lease_s=LONG_S)
    leases = Leases(EventLog(redis, redis), claim, Stopping(), lease_s=LONG_S, max_holders=1)

    async def cursors():
        yield begun

    assert [lease_s async for lease_s in leases.hold(cursors())] == [0.0]
