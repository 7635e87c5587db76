"""Watch: nothing is missed, nothing is told twice, and every watch ends."""

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from softprompt_api.errors import CursorExpired, InvalidArgument, Overloaded, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.status import from_rpc_error
from softprompt_registry import events
from softprompt_registry.server import RegistryServer

HEARTBEAT = pb.ADAPTER_EVENT_TYPE_HEARTBEAT
REGISTERED = pb.ADAPTER_EVENT_TYPE_REGISTERED
VERSION_DELETED = pb.ADAPTER_EVENT_TYPE_VERSION_DELETED
ADAPTER_DELETED = pb.ADAPTER_EVENT_TYPE_ADAPTER_DELETED


class Watch:
    """One watch; `changes` skips heartbeats."""

    def __init__(self, call) -> None:
        self._call = call

    async def next(self) -> pb.WatchAdaptersResponse:
        try:
            async with asyncio.timeout(10):
                return await self._call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def changes(self, count: int) -> list[pb.WatchAdaptersResponse]:
        found: list[pb.WatchAdaptersResponse] = []
        while len(found) < count:
            response = await self.next()
            if response.type != HEARTBEAT:
                found.append(response)
        return found


@asynccontextmanager
async def watching(client, cursor: str = ""):
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=cursor))
    yield Watch(call)
    call.cancel()


async def test_a_watch_begins_with_a_heartbeat_and_goes_on_with_them(client):
    async with watching(client) as watch:
        started = time.monotonic()
        first = await watch.next()
        assert time.monotonic() - started < 1
        assert first.type == HEARTBEAT
        assert first.cursor == "0-0"
        assert [(await watch.next()).type for _ in range(2)] == [HEARTBEAT] * 2


async def test_aliases_labels_and_pins_are_told(client, make_adapter):
    for seed in (1, 2):
        await client.register("tweets", make_adapter(seed))
    async with watching(client) as watch:
        await watch.next()
        aliased = await client.set_alias("tweets", "prod", 1)
        changes = await watch.changes(1)
        await client.set_alias("tweets", "prod", 1)  # changes nothing
        rolled_back = await client.set_alias("tweets", "latest", 1)
        changes += await watch.changes(1)
        pinned = await client.update("tweets@2", "pinned", pinned=True)
        changes += await watch.changes(1)
        await client.set_alias("tweets", "prod", 0)
        changes += await watch.changes(1)
    assert [(change.type, change.alias) for change in changes] == [
        (pb.ADAPTER_EVENT_TYPE_ALIAS_SET, "prod"),
        (pb.ADAPTER_EVENT_TYPE_ALIAS_SET, "latest"),
        (pb.ADAPTER_EVENT_TYPE_UPDATED, ""),
        (pb.ADAPTER_EVENT_TYPE_ALIAS_REMOVED, "prod"),
    ]
    assert [change.adapter for change in changes[:3]] == [aliased, rolled_back, pinned]
    assert list(rolled_back.aliases) == ["latest", "prod"]
    assert changes[3].adapter.name == "tweets"


async def test_every_change_is_told_in_order(client, make_adapter, content):
    async with watching(client) as watch:
        await watch.next()
        one = await client.register("tweets", make_adapter(1))
        two = await client.register("tweets", make_adapter(2))
        await client.delete("tweets", 2)
        three = await client.register("sql", make_adapter(3))
        await client.delete("sql")
        await client.delete("tweets", 1)
        changes = await watch.changes(7)
    types = [change.type for change in changes]
    assert types[:3] == [REGISTERED, REGISTERED, VERSION_DELETED]
    assert types[3:] == [REGISTERED, ADAPTER_DELETED, VERSION_DELETED, ADAPTER_DELETED]
    assert content(changes[0].adapter) == content(one)
    assert content(changes[1].adapter) == content(two)
    assert (changes[2].adapter.name, changes[2].adapter.version) == ("tweets", 2)
    assert changes[2].adapter.digest == two.digest
    assert content(changes[3].adapter) == content(three)
    assert (changes[4].adapter.name, changes[4].adapter.version) == ("sql", 0)
    assert changes[6].adapter.name == "tweets"


async def test_a_watch_resumes_where_another_ended(client, make_adapter):
    names = [f"a{number}" for number in range(6)]
    cursor = (await client.stub.ListAdapters(pb.ListAdaptersRequest())).cursor
    for name in names[:3]:
        await client.register(name, make_adapter())
    async with watching(client, cursor) as watch:
        first = await watch.changes(2)
    for name in names[3:]:
        await client.register(name, make_adapter())
    async with watching(client, first[-1].cursor) as watch:
        rest = await watch.changes(4)
    assert [change.adapter.name for change in (*first, *rest)] == names


async def test_listing_and_then_watching_misses_nothing(client, make_adapter):
    async def keep_registering() -> None:
        for number in range(30):
            await client.register(f"a{number:02}", make_adapter())

    writing = asyncio.create_task(keep_registering())
    known: set[str] = set()
    while len(known) < 5:
        page = await client.stub.ListAdapters(pb.ListAdaptersRequest())
        known |= {adapter.name for adapter in page.adapters}
    async with watching(client, page.cursor) as watch:
        while len(known) < 30:
            known.add((await watch.changes(1))[0].adapter.name)
    await writing


async def test_an_adapter_that_was_deleted_meanwhile_is_told_as_deleted_only(client, make_adapter):
    await client.register("gone", make_adapter())
    await client.delete("gone")
    async with watching(client, "0-0") as watch:
        assert (await watch.changes(1))[0].type == ADAPTER_DELETED


async def test_of_what_is_deleted_beyond_the_batch_name_and_number_are_told(client, make_adapter, monkeypatch):
    """Whoever has been told has taken the change, though it is over."""
    monkeypatch.setattr(events, "_BATCH", 1)
    await client.register("tweets", make_adapter())
    await client.register("tweets", make_adapter(1))
    await client.delete("tweets", 2)
    async with watching(client, "0-0") as watch:
        changes = await watch.changes(3)
    assert [change.type for change in changes] == [REGISTERED, REGISTERED, VERSION_DELETED]
    assert changes[1].adapter == pb.AdapterVersion(name="tweets", version=2)


async def test_of_a_deleted_version_it_is_told_whether_it_was_the_latest(client, make_adapter):
    for seed in range(3):
        await client.register("tweets", make_adapter(seed))
    async with watching(client) as watch:
        await watch.next()
        await client.delete("tweets", 2)
        await client.delete("tweets", 3)
        changes = await watch.changes(2)
    assert [(change.adapter.version, change.alias) for change in changes] == [(2, ""), (3, "latest")]


async def test_of_a_version_that_cannot_be_read_name_and_number_are_told(client, make_adapter, redis):
    version = await client.register("damaged", make_adapter())
    await client.register("gone", make_adapter())
    await client.delete("gone")
    await redis.hset(f"sp:{{v:{version.id}}}", "digest", "x")
    async with watching(client, "0-0") as watch:
        changes = await watch.changes(2)
    assert [change.type for change in changes] == [REGISTERED, ADAPTER_DELETED]
    assert changes[0].adapter == pb.AdapterVersion(name="damaged", version=1)


async def test_a_cursor_older_than_what_is_kept_has_expired(client, make_adapter, redis):
    for _ in range(3):
        await client.register("tweets", make_adapter())
    entries = await redis.xrange("sp:events")
    await redis.xtrim("sp:events", maxlen=1, approximate=False)
    for cursor in ("0-0", entries[0][0].decode()):
        async with watching(client, cursor) as watch:
            with pytest.raises(CursorExpired):
                await watch.next()
    async with watching(client, entries[-1][0].decode()) as watch:
        assert (await watch.next()).type == HEARTBEAT


@pytest.mark.parametrize(
    "damage",
    [{"type": "x"}, {"id": "x"}, {"version": ""}, {"version": str(2**31)}, {"name": b"\xff"}, {"type": None}],
)
async def test_a_change_that_cannot_be_read_is_skipped_by_nobody_and_stops_nobody_who_lists_again(
    client, make_adapter, redis, forever, damage
):
    async with watching(client) as watch:
        begun = await watch.next()
        await client.register("tweets", make_adapter())
        told = (await watch.changes(1))[0]
        [(_, fields)] = await redis.xrange("sp:events", told.cursor, told.cursor)
        damaged = {name.decode(): value for name, value in fields.items()} | damage
        await redis.xadd("sp:events", {name: value for name, value in damaged.items() if value is not None})
        with pytest.raises(CursorExpired):
            await forever(watch.next)
    for cursor in (begun.cursor, told.cursor):
        async with watching(client, cursor) as watch:
            assert (await watch.next()).type == HEARTBEAT
            with pytest.raises(CursorExpired):
                await forever(watch.next)
    listed = await client.stub.ListAdapters(pb.ListAdaptersRequest())
    async with watching(client, listed.cursor) as watch:
        await client.register("sms", make_adapter())
        assert (await watch.changes(1))[0].adapter.name == "sms"


async def test_a_watcher_that_fell_behind_is_told_so(client, make_adapter, redis, forever):
    await client.register("tweets", make_adapter())
    async with watching(client) as watch:
        await watch.next()
        transaction = redis.pipeline(transaction=True)
        for _ in range(3):
            events.append(transaction, events.EventType.ADAPTER_DELETED, name="tweets")
        transaction.xtrim("sp:events", maxlen=1, approximate=False)
        await transaction.execute()
        with pytest.raises(CursorExpired):
            await forever(watch.next)


async def test_a_cursor_from_before_the_store_was_restored_has_expired_whatever_it_has_seen_since(
    client, make_adapter, redis
):
    await client.register("tweets", make_adapter())
    backup = await redis.dump("sp:events")
    await client.register("lost", make_adapter())
    [(lost, _)] = await redis.xrevrange("sp:events", count=1)
    await redis.restore("sp:events", 0, backup, replace=True)
    for _ in range(2):
        async with watching(client, lost.decode()) as watch:
            with pytest.raises(CursorExpired, match="not of this store"):
                await watch.next()
        await client.register("since", make_adapter())


async def test_a_cursor_of_another_store_has_expired(client, make_adapter):
    await client.register("tweets", make_adapter())
    async with watching(client, "99999999999999-0") as watch:
        with pytest.raises(CursorExpired):
            await watch.next()


@pytest.mark.parametrize("cursor", ["x", "1", "1-", "-1-0", "$", "1-0\n", "٣-0", "1" * 30 + "-0"])
async def test_what_is_no_cursor_is_refused(client, cursor):
    async with watching(client, cursor) as watch:
        with pytest.raises(InvalidArgument) as refused:
            await watch.next()
    assert refused.value.field == "cursor"


async def test_a_watch_ends_when_the_registry_stops(settings, connect, forever):
    server = RegistryServer(settings)
    await server.start()
    client = connect(server.port)
    async with watching(client) as watch:
        await watch.next()
        started = time.monotonic()
        stopping = asyncio.create_task(server.stop())
        with pytest.raises(Unavailable):
            await forever(watch.next)
        await stopping
        assert time.monotonic() - started < settings.grace_s / 2
    await client.channel.close()


async def test_a_watch_ends_when_its_client_leaves(settings, connect, eventually, redis):
    async with RegistryServer(settings.model_copy(update={"max_watchers": 2})) as server:
        client = connect(server.port)
        calls = [client.stub.WatchAdapters(pb.WatchAdaptersRequest()) for _ in range(2)]
        for call in calls:
            await call.read()
        async with watching(client) as one_too_many:
            with pytest.raises(Overloaded):
                await one_too_many.next()
        calls[0].cancel()

        async def has_room() -> bool:
            async with watching(client) as watch:
                try:
                    return bool(await watch.next())
                except Overloaded:
                    return False

        await eventually(has_room)
        await client.channel.close()
