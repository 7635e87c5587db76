"""Aliases, labels and pins over gRPC, with a real store."""

import asyncio

import pytest
from softprompt_api.errors import (
    AdapterConflict,
    AdapterInUse,
    AdapterNotFound,
    AliasMoved,
    DataCorrupted,
    InvalidArgument,
)
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry.amendments import MAX_ALIASES


@pytest.fixture
async def three(client, make_adapter):
    """Three versions of "tweets"."""
    return [await client.register("tweets", make_adapter(seed)) for seed in range(3)]


async def latest(client) -> int:
    return (await client.get("tweets")).version


async def test_an_alias_points_to_the_version_it_was_set_to_until_it_is_moved(client, three):
    set_to = await client.set_alias("tweets", "prod", 2)
    assert (set_to.version, list(set_to.aliases)) == (2, ["prod"])
    assert await client.get("tweets@prod") == await client.get("tweets@2") == set_to
    assert await client.get(set_to.digest) == set_to
    moved = await client.set_alias("tweets", "prod", 3)
    assert list(moved.aliases) == ["latest", "prod"]
    assert (await client.get("tweets@prod")).digest == three[2].digest
    assert list((await client.get("tweets@2")).aliases) == []


async def test_a_removed_alias_is_not_found_with_its_name(client, three):
    await client.set_alias("tweets", "prod", 2)
    assert await client.set_alias("tweets", "prod", 0) is None
    with pytest.raises(AdapterNotFound, match="has no alias 'prod'; tweets alone stands for version 3"):
        await client.get("tweets@prod")
    with pytest.raises(AdapterNotFound, match="has no alias 'prod'"):
        await client.set_alias("tweets", "prod", 0)


async def test_a_mistyped_alias_is_told_the_near_one(client, three):
    await client.set_alias("tweets", "production", 2)
    with pytest.raises(AdapterNotFound) as missing:
        await client.get("tweets@prodcution")
    assert missing.value.details == {"did_you_mean": "tweets@production"}


async def test_a_deletion_is_refused_with_a_reason_however_much_stands_in_its_way(client, make_adapter):
    name = 128 * "a"
    for seed in range(24):
        version = (await client.register(name, make_adapter(seed))).version
        await client.update(f"{name}@{version}", "pinned", pinned=True)
        await client.set_alias(name, f"b{seed:0127}", 1)
    with pytest.raises(AdapterInUse, match="and 16 more are pinned"):
        await client.delete(name)
    await client.update(f"{name}@1", "pinned", pinned=False)
    with pytest.raises(AdapterInUse, match="and 16 more point to"):
        await client.delete(name, 1)


async def test_aliases_of_names_are_their_own(client, three, make_adapter):
    await client.register("sms", make_adapter(9))
    await client.set_alias("tweets", "prod", 2)
    await client.set_alias("sms", "prod", 1)
    assert (await client.get("tweets@prod")).digest == three[1].digest
    assert (await client.get("sms@prod")).name == "sms"


async def test_latest_is_rolled_back_and_a_registration_moves_it_on(client, three, make_adapter):
    assert list(three[2].aliases) == ["latest"]
    await client.set_alias("tweets", "latest", 1)
    assert await latest(client) == 1
    assert (await client.get("tweets@latest")).digest == three[0].digest
    assert list((await client.get("tweets@3")).aliases) == []
    listed = await client.stub.ListAdapters(pb.ListAdaptersRequest())
    assert [(version.version, list(version.aliases)) for version in listed.adapters] == [(1, ["latest"])]
    made = await client.register("tweets", make_adapter(7))
    assert (made.version, list(made.aliases)) == (4, ["latest"])
    assert await client.get("tweets") == made


async def test_deleting_the_version_that_latest_points_to_makes_it_the_highest_left(client, three):
    await client.set_alias("tweets", "latest", 1)
    await client.delete("tweets", 1)
    assert await latest(client) == 3
    await client.delete("tweets", 3)
    assert await latest(client) == 2


async def test_deleting_another_version_leaves_a_rolled_back_latest_where_it_is(client, three):
    await client.set_alias("tweets", "latest", 1)
    await client.delete("tweets", 3)
    assert await latest(client) == 1
    with pytest.raises(AdapterNotFound, match="alone stands for version 1"):
        await client.get("tweets@3")


async def test_latest_cannot_be_removed(client, three):
    with pytest.raises(InvalidArgument) as refused:
        await client.set_alias("tweets", "latest", 0)
    assert refused.value.field == "alias"


async def test_an_alias_needs_a_version_that_is_there(client, three):
    for name, version in (("tweets", 4), ("nobody", 1)):
        with pytest.raises(AdapterNotFound):
            await client.set_alias(name, "prod", version)
    for version in (-1, 2**31 - 1):
        with pytest.raises((AdapterNotFound, InvalidArgument)):
            await client.set_alias("tweets", "prod", version)


@pytest.mark.parametrize("alias", ["", "1", "2.0", "Prod", "a@b", "../x", "a" * 129])
async def test_what_is_no_alias_is_refused(client, three, alias):
    with pytest.raises(InvalidArgument) as refused:
        await client.set_alias("tweets", alias, 1)
    assert refused.value.field == "alias"


async def test_an_alias_moves_only_from_where_it_was_expected(client, three):
    with pytest.raises(AliasMoved, match="does not exist"):
        await client.set_alias("tweets", "prod", 2, expected=1)
    await client.set_alias("tweets", "prod", 1, expected=0)
    with pytest.raises(AliasMoved, match="points to version 1") as refused:
        await client.set_alias("tweets", "prod", 3, expected=2)
    assert (refused.value.field, refused.value.details) == ("expected_version", {"version": "1"})
    with pytest.raises(AliasMoved):
        await client.set_alias("tweets", "prod", 2, expected=0)
    assert (await client.get("tweets@prod")).version == 1
    await client.set_alias("tweets", "prod", 2, expected=1)
    # As after an answer that was lost: it is there already.
    await client.set_alias("tweets", "prod", 2, expected=1)
    with pytest.raises(AliasMoved):
        await client.set_alias("tweets", "prod", 0, expected=1)
    assert await client.set_alias("tweets", "prod", 0, expected=2) is None
    with pytest.raises(AliasMoved):
        await client.set_alias("tweets", "latest", 1, expected=1)
    await client.set_alias("tweets", "latest", 1, expected=3)


async def test_of_racing_writers_with_one_expectation_one_wins(client, three):
    await client.set_alias("tweets", "prod", 1)
    tried = await asyncio.gather(
        *(client.set_alias("tweets", "prod", 2 + number % 2, expected=1) for number in range(16)),
        return_exceptions=True,
    )
    winner = (await client.get("tweets@prod")).version
    assert winner in (2, 3)
    for number, outcome in enumerate(tried):
        assert isinstance(outcome, AliasMoved) == (2 + number % 2 != winner)


async def test_aliases_are_bounded_in_number(client, three):
    for number in range(MAX_ALIASES):
        await client.set_alias("tweets", f"a{number}", 1 + number % 3)
    with pytest.raises(InvalidArgument, match="as many as are allowed"):
        await client.set_alias("tweets", "one-more", 1)
    await client.set_alias("tweets", "a0", 2)


async def test_a_version_that_an_alias_points_to_is_kept(client, three):
    await client.set_alias("tweets", "prod", 2)
    await client.set_alias("tweets", "beta", 2)
    with pytest.raises(AdapterInUse, match="the aliases beta, prod point to tweets@2"):
        await client.delete("tweets", 2)
    await client.set_alias("tweets", "beta", 0)
    with pytest.raises(AdapterInUse, match="the alias prod points to tweets@2"):
        await client.delete("tweets", 2)
    await client.set_alias("tweets", "prod", 3)
    await client.delete("tweets", 2)
    assert await client.versions("tweets") == [3, 1]


async def test_a_deleted_name_takes_its_aliases_along(client, three, make_adapter, redis):
    await client.set_alias("tweets", "prod", 2)
    await client.set_alias("tweets", "latest", 2)
    await client.delete("tweets")
    assert await redis.keys("sp:{n:tweets}:*") == []
    made = await client.register("tweets", make_adapter(5))
    assert (made.version, await latest(client)) == (4, 4)
    with pytest.raises(AdapterNotFound):
        await client.get("tweets@prod")


async def test_a_revision_only_grows_whatever_is_done_to_a_name(client, make_adapter):
    revisions = [(await client.register("tweets", make_adapter(1))).revision]
    revisions.append((await client.register("tweets", make_adapter(2))).revision)
    revisions.append((await client.set_alias("tweets", "prod", 1)).revision)
    await client.set_alias("tweets", "prod", 0)
    revisions.append((await client.get("tweets")).revision)
    revisions.append((await client.update("tweets", "pinned", pinned=True)).revision)
    await client.update("tweets", "pinned", pinned=False)
    await client.delete("tweets")
    revisions.append((await client.register("tweets", make_adapter(1))).revision)
    assert revisions == sorted(set(revisions))
    unchanged = await client.update("tweets", "pinned", pinned=False)
    assert unchanged.revision == revisions[-1]


async def test_labels_are_replaced_whole_or_one_by_one(client, make_adapter, content):
    made = await client.register("tweets", make_adapter().but(header={"labels": {"a": "1", "b": "2"}}))
    assert dict((await client.update("tweets", "labels.b", "labels.c.d", labels={"c.d": "3"})).labels) == {
        "a": "1",
        "c.d": "3",
    }
    replaced = await client.update("tweets@1", "labels", labels={"x": "y"})
    assert dict(replaced.labels) == {"x": "y"}
    assert await client.get("tweets") == replaced
    assert dict((await client.update("tweets", "labels")).labels) == {}
    # What is not named in the mask stays.
    assert dict((await client.update("tweets", "pinned", labels={"x": "y"}, pinned=True)).labels) == {}
    after = content(await client.get("tweets"))
    after.pinned = False
    after.labels.update(made.labels)
    assert after == content(made)


async def test_labels_that_are_set_at_once_are_all_kept(client, make_adapter):
    await client.register("tweets", make_adapter())
    await asyncio.gather(
        *(client.update("tweets", f"labels.k{number}", labels={f"k{number}": "v"}) for number in range(16))
    )
    assert len((await client.get("tweets")).labels) == 16


@pytest.mark.parametrize(
    ("paths", "values", "field"),
    [
        ([], {"pinned": True}, "update_mask"),
        (["digest"], {}, "update_mask"),
        (["pinned", "name"], {}, "update_mask"),
        (["labels"], {"labels": {"": "v"}}, "labels"),
        (["labels."], {"labels": {"": "v"}}, "labels"),
        (["labels.k"], {"labels": {"k": "v" * 257}}, "labels"),
        (["labels.k"], {"labels": {"k": "\x1b[2J"}}, "labels"),
        (["labels"], {"labels": {str(number): "v" for number in range(33)}}, "labels"),
    ],
)
async def test_a_bad_update_is_refused_by_field(client, make_adapter, paths, values, field):
    made = await client.register("tweets", make_adapter())
    with pytest.raises(InvalidArgument) as refused:
        await client.update("tweets", *paths, **values)
    assert refused.value.field == field
    assert await client.get("tweets") == made


async def test_an_update_means_one_version(client, three):
    await client.set_alias("tweets", "prod", 1)
    await client.update("tweets@prod", "labels.stage", labels={"stage": "prod"})
    await client.update("tweets", "pinned", pinned=True)
    assert [bool((await client.get(f"tweets@{number}")).labels) for number in (1, 2, 3)] == [True, False, False]
    assert [(await client.get(f"tweets@{number}")).pinned for number in (1, 2, 3)] == [False, False, True]
    with pytest.raises(InvalidArgument, match="name@version"):
        await client.update(three[0].digest, "pinned", pinned=True)
    for spelling in ("tweets@4", "tweets@beta", "nobody"):
        with pytest.raises(AdapterNotFound):
            await client.update(spelling, "pinned", pinned=True)


async def test_a_pinned_version_and_its_name_are_kept(client, three):
    await client.update("tweets@2", "pinned", pinned=True)
    with pytest.raises(AdapterInUse, match="tweets@2 is pinned"):
        await client.delete("tweets", 2)
    with pytest.raises(AdapterConflict, match="tweets@2 is pinned"):
        await client.delete("tweets")
    await client.delete("tweets", 1)
    await client.update("tweets@3", "pinned", pinned=True)
    with pytest.raises(AdapterInUse, match="tweets@2, tweets@3 are pinned"):
        await client.delete("tweets")
    for number in (2, 3):
        await client.update(f"tweets@{number}", "pinned", pinned=False)
    await client.delete("tweets")
    assert await client.names() == []


async def test_a_pin_and_a_deletion_that_race_do_not_both_happen(client, make_adapter):
    for _ in range(20):
        version = (await client.register("tweets", make_adapter())).version
        pinned, deleted = await asyncio.gather(
            client.update(f"tweets@{version}", "pinned", pinned=True),
            client.delete("tweets", version),
            return_exceptions=True,
        )
        if isinstance(deleted, AdapterInUse):
            assert pinned.pinned
            assert (await client.get(f"tweets@{version}")).pinned
        else:
            assert deleted is None
            assert isinstance(pinned, AdapterNotFound)
            with pytest.raises(AdapterNotFound):
                await client.get(f"tweets@{version}")


async def test_an_alias_and_a_deletion_that_race_leave_no_alias_that_points_nowhere(client, make_adapter):
    await client.register("tweets", make_adapter(99))
    for _ in range(20):
        version = (await client.register("tweets", make_adapter())).version
        aliased, deleted = await asyncio.gather(
            client.set_alias("tweets", "prod", version),
            client.delete("tweets", version),
            return_exceptions=True,
        )
        assert isinstance(deleted, AdapterInUse) != isinstance(aliased, AdapterNotFound)
        if isinstance(deleted, AdapterInUse):
            assert (await client.get("tweets@prod")).version == version
            await client.set_alias("tweets", "prod", 0)
        else:
            with pytest.raises(AdapterNotFound):
                await client.get("tweets@prod")


def flipped(value: bytes, bit: int) -> bytes:
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


async def damages(redis, name):
    """Every way to flip one bit of what a name's pointers are: (what to do, how to undo it)."""
    for key in (f"sp:{{n:{name}}}", f"sp:{{n:{name}}}:a"):
        for field, value in (await redis.hgetall(key)).items():
            for bit in range(0, 8 * len(value), 37 if field == b"sha256" else 1):
                yield (
                    redis.hset(key, field, flipped(value, bit)),
                    lambda k=key, f=field, v=value: redis.hset(k, f, v),
                )
    versions = f"sp:{{n:{name}}}:v"
    for member, number in await redis.zrange(versions, 0, -1, withscores=True):
        for other in (number + 8, -number):
            yield (
                redis.zadd(versions, {member: other}),
                lambda m=member, n=number: redis.zadd(versions, {m: n}),
            )


@pytest.mark.usefixtures("nothing_kept")
async def test_a_flipped_bit_in_what_points_to_versions_is_found_out_and_costs_its_name_alone(
    client, three, make_adapter, redis
):
    shared = await client.register("sms", make_adapter(2))  # the same content as the third version
    assert shared.digest == three[2].digest
    await client.set_alias("tweets", "prod", 2)
    whole = [await client.get(spelling) for spelling in ("tweets", "tweets@prod")]
    num_found_out = num_damages = 0
    async for damage, undo in damages(redis, "tweets"):
        await damage
        num_damages += 1
        for spelling, version in zip(("tweets", "tweets@prod"), whole, strict=True):
            try:
                assert await client.get(spelling) == version, "damage was served"
            except (DataCorrupted, AdapterNotFound):
                num_found_out += 1
        assert (await client.get("sms")).digest == shared.digest
        assert await client.read(shared.digest) == make_adapter(2).tensors
        assert "sms" in await client.names()
        await undo()
    # A number may be spelled in two ways, and the order of older versions points to none.
    assert num_found_out > 2 * 0.9 * num_damages
    assert [await client.get(spelling) for spelling in ("tweets", "tweets@prod")] == whole


async def test_a_name_whose_aliases_are_damaged_can_be_deleted_and_made_anew(client, three, make_adapter, redis):
    await client.set_alias("tweets", "prod", 2)
    await redis.hset("sp:{n:tweets}:a", "prod", "999")
    for change in (
        client.set_alias("tweets", "beta", 1),
        client.register("tweets", make_adapter(5)),
        client.update("tweets@1", "pinned", pinned=True),
    ):
        with pytest.raises(DataCorrupted, match="delete the name"):
            await change
    await client.delete("tweets")
    made = await client.register("tweets", make_adapter(5))
    assert made.version > 3, "a number was given again"
    assert list(made.aliases) == ["latest"]
    assert await client.get("tweets") == made


@pytest.mark.parametrize(
    "damage", [{"next": "t"}, {"next": "1"}, {"revision": "t"}, {"revision": "1"}, {"next": "t", "revision": "t"}]
)
async def test_a_name_whose_counters_are_damaged_can_be_deleted_and_made_anew(
    client, three, make_adapter, redis, damage
):
    await client.delete("tweets", 3)
    revision = (await client.get("tweets")).revision
    await redis.hset("sp:{n:tweets}", mapping=damage)
    with pytest.raises(DataCorrupted, match="delete the name"):
        await client.register("tweets", make_adapter(5))
    await client.delete("tweets")
    assert await client.names() == []
    made = await client.register("tweets", make_adapter(5))
    assert made.version > 3, "a number was given again"
    assert made.revision > revision
    assert await client.get("tweets") == made


async def test_counters_that_are_damaged_after_the_deletion_are_replaced_by_another(
    client, three, make_adapter, redis
):
    await client.delete("tweets")
    await redis.hset("sp:{n:tweets}", "next", "1")
    with pytest.raises(DataCorrupted, match="delete the name"):
        await client.register("tweets", make_adapter(5))
    with pytest.raises(AdapterNotFound):
        await client.delete("tweets")
    assert (await client.register("tweets", make_adapter(5))).version > 3


async def test_every_change_leaves_pointers_that_are_whole(client, three, make_adapter):
    await client.set_alias("tweets", "prod", 2)
    await client.set_alias("tweets", "beta", 2)
    await client.set_alias("tweets", "beta", 0)
    await client.update("tweets@2", "labels.a", labels={"a": "b"})
    await client.set_alias("tweets", "latest", 1)
    await client.delete("tweets", 3)  # the highest
    await client.delete("tweets", 1)  # what latest was moved to
    assert (await client.get("tweets")).version == 2
    await client.set_alias("tweets", "prod", 0)
    await client.delete("tweets", 2)
    assert (await client.register("tweets", make_adapter(7))).version == 4
    await client.delete("tweets")
    assert (await client.register("tweets", make_adapter(8))).version == 5


async def test_a_name_from_before_its_pointers_had_a_sha256_is_read_and_sealed_by_its_next_change(
    client, three, redis
):
    await redis.hdel("sp:{n:tweets}", "sha256")
    assert (await client.get("tweets")).version == 3
    await client.set_alias("tweets", "prod", 2)
    await redis.hset("sp:{n:tweets}:a", "prod", str(three[0].id))
    with pytest.raises(DataCorrupted):
        await client.get("tweets@prod")
