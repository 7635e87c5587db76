"""What was read lately is told again only as long as it stands: no change is missed, whoever made it."""

import asyncio

import pytest
from softprompt_api.errors import AdapterNotFound, DataCorrupted
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry import recent
from softprompt_registry.server import RegistryServer


@pytest.fixture
async def tweets(client, make_adapter):
    """Two versions of a name, each spelling of which was asked for."""
    versions = [await client.register("tweets", make_adapter(seed)) for seed in range(2)]
    await client.set_alias("tweets", "prod", 1)
    for spelling in ("tweets", "tweets@prod", "tweets@1", "tweets@2", *(version.digest for version in versions)):
        assert await client.get(spelling) == await client.get(spelling)
    return versions


async def test_every_change_is_told_by_the_next_answer(client, make_adapter, tweets):
    third = await client.register("tweets", make_adapter(7))
    assert await client.get("tweets") == third
    assert list((await client.get("tweets@2")).aliases) == []
    await client.set_alias("tweets", "prod", 2)
    assert (await client.get("tweets@prod")).version == 2
    assert list((await client.get(tweets[1].digest)).aliases) == ["prod"]
    await client.update("tweets@3", "labels.stage", labels={"stage": "new"})
    assert (await client.get("tweets")).labels == {"stage": "new"}
    await client.update("tweets@3", "pinned", pinned=True)
    assert (await client.get("tweets")).pinned
    await client.update("tweets@3", "pinned", pinned=False)
    probe = pb.Probe(effects=[pb.Effect(mean_kl=1, max_kl=2, num_prompts=3)], base_model_id="m", dtype="float32")
    await client.stub.RecordProbe(pb.RecordProbeRequest(adapter="tweets@3", digest=third.digest, probe=probe))
    assert (await client.get("tweets")).probe.base_model_id == "m"
    await client.set_alias("tweets", "prod", 0)
    with pytest.raises(AdapterNotFound):
        await client.get("tweets@prod")
    await client.delete("tweets", 3)
    assert (await client.get("tweets")).version == 2
    with pytest.raises(AdapterNotFound):
        await client.get("tweets@3")


async def test_a_name_that_was_deleted_and_made_anew_is_another(client, make_adapter, tweets):
    await client.delete("tweets")
    for spelling in ("tweets", "tweets@1", tweets[0].digest):
        with pytest.raises(AdapterNotFound):
            await client.get(spelling)
    made = await client.register("tweets", make_adapter(9))
    assert await client.get("tweets") == made


async def test_what_another_registry_changes_is_told(client, connect, make_adapter, settings, tweets):
    async with RegistryServer(settings) as other:
        theirs = connect(other.port)
        made = await theirs.register("tweets", make_adapter(9))
        assert await client.get("tweets") == made
        await client.set_alias("tweets", "latest", 1)
        assert (await theirs.get("tweets")).version == 1
        await theirs.channel.close()


async def test_a_store_that_was_emptied_and_filled_anew_answers_by_itself(client, make_adapter, redis, tweets):
    base_models = await redis.hgetall("sp:base")
    await redis.flushall()
    with pytest.raises(AdapterNotFound):
        await client.get("tweets")
    await redis.hset("sp:base", mapping=base_models)
    # Names, numbers, ids and revisions are those of before, and what they name is not.
    made = [await client.register("tweets", make_adapter(seed)) for seed in (20, 21)]
    await client.set_alias("tweets", "prod", 1)
    assert [version.id for version in made] == [version.id for version in tweets]
    assert (await client.get("tweets")).digest == made[1].digest
    assert (await client.get("tweets@prod")).digest == made[0].digest
    with pytest.raises(AdapterNotFound):
        await client.get(tweets[1].digest)


async def test_damage_to_what_lies_beside_a_record_is_found_out(client, redis, tweets):
    await redis.hset(f"sp:{{v:{tweets[1].id}}}", "sha256", "0" * 64)
    with pytest.raises(DataCorrupted):
        await client.get("tweets")


async def test_only_what_was_asked_for_last_is_kept(client, make_adapter, redis, monkeypatch):
    monkeypatch.setattr(recent, "_MAX_KEPT", 2)
    for name in ("a", "b", "c"):
        await client.register(name, make_adapter())
    for name in ("a", "b", "a", "c"):
        await client.get(name)
    for name, is_kept in (("b", False), ("c", True), ("b", True), ("a", False)):
        await redis.config_resetstat()
        await client.get(name)
        # Of one that is kept its aliases alone are read, and not its record.
        assert ((await redis.info("commandstats"))["cmdstat_hgetall"]["calls"] == 1) == is_kept, name


async def test_a_config_of_any_size_is_told_and_a_huge_one_not_kept(client, make_adapter, redis):
    labels = {f"label-{number}": "\U0001d11e" * 256 for number in range(32)}
    sizes = [
        ("x" * 100, {}, True),
        ("x" * 100_000, {}, False),
        ("\U0001d11e" * 5000, {}, False),
        ("x", labels, False),
    ]
    for number, (text, labelled, is_kept) in enumerate(sizes):
        adapter = make_adapter().but(header={"labels": labelled})
        adapter = adapter.but(config={**adapter.config, "prompt_tuning_init_text": text})
        made = await client.register(f"of-{number}", adapter)
        assert await client.get(made.name) == made
        await redis.config_resetstat()
        assert await client.get(made.name) == made
        assert ((await redis.info("commandstats"))["cmdstat_hgetall"]["calls"] == 1) == is_kept


async def test_a_name_that_changes_all_the_time_is_never_told_of_before(client, tweets):
    async def change() -> None:
        for number in range(40):
            await client.set_alias("tweets", "prod", 1 + number % 2)
            assert (await client.get("tweets@prod")).version == 1 + number % 2

    async def ask() -> None:
        while not changing.done():
            version = await client.get("tweets@prod")
            assert "prod" in version.aliases

    changing = asyncio.create_task(change())
    await asyncio.gather(changing, ask(), ask())
