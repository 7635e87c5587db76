"""What the registry asks of its store for one adapter does not grow with how many there are."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from softprompt_api.errors import AdapterNotFound
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry.settings import Settings

FEW, MANY = 10, 1000
# What the registry's own health check and this test ask.
_OURS = {"ping", "info", "config|resetstat"}
_SCANS = {"keys", "scan", "hscan", "sscan", "zscan", "smembers", "sort", "hkeys", "hvals"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """What is counted here must not end because a busy machine is slow."""
    return settings.model_copy(update={"store_timeout_s": 20.0})


async def commands(redis, call: Callable[[], Awaitable[object]]) -> dict[str, int]:
    """How often each command of the store is used by a call."""
    await redis.config_resetstat()
    await call()
    stats = {name.removeprefix("cmdstat_"): entry for name, entry in (await redis.info("commandstats")).items()}
    return {name: entry["calls"] for name, entry in stats.items() if name not in _OURS}


async def fill(client, make_adapter, numbers: range) -> None:
    left = iter(numbers)

    async def register() -> None:
        for number in left:
            await client.register(f"a{number:04}", make_adapter(number, num_virtual_tokens=1))

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(register())


@pytest.fixture
def calls(client, make_adapter):
    """Every kind of question, and every change."""

    async def get(spelling: str) -> None:
        assert await client.get(spelling)

    async def by_digest() -> None:
        # Two questions: the first one tells the digest.
        await client.get((await client.get("a0005")).digest)

    async def read() -> None:
        assert await client.read((await client.get("a0005")).digest)

    async def page() -> None:
        first = await client.stub.ListAdapters(pb.ListAdaptersRequest(page_size=4))
        following = pb.ListAdaptersRequest(page_size=4, page_token=first.next_page_token)
        names = [version.name for version in (await client.stub.ListAdapters(following)).adapters]
        assert names == ["a0004", "a0005", "a0006", "a0007"]

    async def unknown() -> None:
        with pytest.raises(AdapterNotFound):
            await client.get("b0005")

    async def made_and_gone() -> None:
        made = await client.register("fresh", make_adapter(10_000))
        await client.set_alias("fresh", "prod", made.version)
        await client.update("fresh", "pinned", pinned=True)
        await client.update("fresh", "pinned", pinned=False)
        await client.set_alias("fresh", "prod", 0)
        await client.delete("fresh", made.version)

    return {
        "name": lambda: get("a0005"),
        "version": lambda: get("a0005@1"),
        "alias": lambda: get("a0005@latest"),
        "digest": by_digest,
        "tensors": read,
        "page": page,
        "versions": lambda: client.versions("a0005"),
        "prefix": lambda: client.names(name_prefix="a000"),
        "unknown": unknown,
        "changes": made_and_gone,
    }


@pytest.mark.usefixtures("nothing_kept")
async def test_no_call_asks_the_store_more_when_there_are_a_hundred_times_as_many(
    client, make_adapter, redis, calls
):
    await fill(client, make_adapter, range(FEW))
    few = {name: await commands(redis, call) for name, call in calls.items()}
    await fill(client, make_adapter, range(FEW, MANY))
    many = {name: await commands(redis, call) for name, call in calls.items()}
    assert many == few
    assert not _SCANS & {command for used in many.values() for command in used}


async def test_resolving_takes_one_turn_that_reads_its_own_records_alone(client, make_adapter, redis):
    await fill(client, make_adapter, range(FEW))
    # Which version it is, that it is there, what points to its name, and the version.
    told = {"eval": 1, "exists": 1, "hmget": 1, "hgetall": 2}
    for_name = {"hget": 1, "zrange": 2}
    assert await commands(redis, lambda: client.get("a0005")) == {**told, **for_name}
    # Later only whether they are as they were.
    assert await commands(redis, lambda: client.get("a0005")) == {**told, "hget": 2, "zrange": 2, "hgetall": 1}
    digest = (await client.get("a0006")).digest
    assert await commands(redis, lambda: client.get(digest)) == {**told, **for_name}
    assert await commands(redis, lambda: client.get(digest)) == {**told, "hget": 2, "zrange": 1, "hgetall": 1}


async def test_the_tensors_of_one_chunk_come_in_one_turn(client, make_adapter, redis):
    digest = (await client.register("tweets", make_adapter())).digest
    used = await commands(redis, lambda: client.read(digest))
    assert used == {"eval": 1, "zrange": 1, "hget": 1, "hgetall": 2, "get": 1}


async def test_a_registration_of_one_chunk_writes_twice(client, make_adapter, redis):
    used = await commands(redis, lambda: client.register("tweets", make_adapter()))
    # An id, and the transaction that holds everything: nothing is staged, renamed or removed.
    assert (used["incrby"], used["exec"], used["set"]) == (1, 1, 1)
    assert not {"rename", "persist", "unlink", "exists"} & used.keys()


async def test_a_large_page_is_read_in_few_turns(client, make_adapter, redis):
    await fill(client, make_adapter, range(200))
    used = await commands(redis, lambda: client.stub.ListAdapters(pb.ListAdaptersRequest(page_size=200)))
    assert used["zrangebylex"] <= 6
    assert used["hmget"] == 200


async def test_a_watcher_that_catches_up_asks_for_many_changes_at_once(client, make_adapter, redis):
    start = (await client.stub.ListAdapters(pb.ListAdaptersRequest())).cursor
    await fill(client, make_adapter, range(200))

    async def catch_up() -> None:
        call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=start), timeout=20)
        seen = 0
        while seen < 200:
            seen += (await call.read()).type == pb.ADAPTER_EVENT_TYPE_REGISTERED
        call.cancel()

    used = await commands(redis, catch_up)
    assert used["eval"] <= 10
