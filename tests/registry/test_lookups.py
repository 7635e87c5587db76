"""The scripts that run in the store: each tells what a spelling leads to, whole, or that nothing has changed."""

from dataclasses import replace

import pytest
from softprompt_registry import keys, pointers
from softprompt_registry.blobs import decode_blob
from softprompt_registry.codec import decode_version
from softprompt_registry.lookups import Found, Lookups, Seals

NOTHING_SEALED = Seals(pointers=b"", record=b"")


@pytest.fixture
def lookups(redis) -> Lookups:
    return Lookups(redis)


@pytest.fixture
async def tweets(client, make_adapter):
    """Two versions of a name, the first of which has an alias."""
    versions = [await client.register("tweets", make_adapter(seed)) for seed in range(2)]
    await client.set_alias("tweets", "prod", 1)
    return versions


def seals_of(found: Found) -> Seals:
    return Seals(pointers=found.pointers[0][2], record=found.record[b"sha256"])


@pytest.mark.parametrize(
    ("spelled", "number"),
    [({}, 2), ({"alias": "prod"}, 1), ({"alias": "latest"}, 2), ({"number": 1}, 1), ({"number": 2}, 2)],
)
async def test_a_name_leads_to_a_version_with_what_points_to_it(lookups, tweets, spelled, number):
    found = await lookups.by_name("tweets", **spelled)
    version = decode_version(found.record, version_id=found.version_id)
    assert (version.name, version.version, version.digest) == ("tweets", number, tweets[number - 1].digest)
    known = pointers.decode(found.pointers)
    assert (known.highest, dict(known.moved)) == (tweets[1].id, {"prod": tweets[0].id})


async def test_a_file_that_is_small_enough_is_told_with_its_version(redis, client, lookups, tweets):
    size_bytes = tweets[1].size_bytes
    found = await lookups.by_name("tweets", file_up_to_bytes=size_bytes)
    blob = decode_blob(found.start.facts, sha256=tweets[1].tensors_sha256)
    assert (len(found.start.chunk), blob.size_bytes) == (size_bytes, size_bytes)
    assert replace(found, start=None) == await lookups.by_name("tweets")
    assert (await lookups.by_name("tweets", file_up_to_bytes=size_bytes - 1)).start is None
    await redis.delete(keys.chunk(blob.sha256, 0))
    assert (await lookups.by_name("tweets", file_up_to_bytes=size_bytes)).start.chunk is None
    await redis.delete(keys.blob(blob.sha256))
    assert (await lookups.by_name("tweets", file_up_to_bytes=size_bytes)).start is None
    assert await lookups.by_name("nobody", file_up_to_bytes=size_bytes) is None


@pytest.mark.parametrize("spelled", [{"alias": "stage"}, {"number": 3}])
async def test_what_a_name_lacks_is_not_found(lookups, tweets, spelled):
    assert await lookups.by_name("tweets", **spelled) is None
    assert await lookups.by_name("nobody", **spelled) is None
    assert await lookups.by_name("nobody") is None


async def test_a_moved_latest_is_followed(client, lookups, tweets):
    await client.set_alias("tweets", "latest", 1)
    assert (await lookups.by_name("tweets")).version_id == tweets[0].id


async def test_under_its_seals_a_version_is_unchanged_until_something_of_it_changes(client, lookups, tweets):
    seals = seals_of(await lookups.by_name("tweets"))
    assert await lookups.by_name("tweets", seals=seals) == Found(is_unchanged=True)
    assert await lookups.by_id(tweets[1].id, seals=seals) == Found(is_unchanged=True)
    # The other version has the same name, and another record.
    assert not (await lookups.by_name("tweets", number=1, seals=seals)).is_unchanged
    await client.update("tweets@2", "labels.stage", labels={"stage": "new"})
    changed = await lookups.by_name("tweets", seals=seals)
    assert decode_version(changed.record, version_id=changed.version_id).labels == {"stage": "new"}
    seals = seals_of(changed)
    await client.set_alias("tweets", "stage", 1)
    assert not (await lookups.by_name("tweets", seals=seals)).is_unchanged


async def test_what_has_no_seal_is_never_unchanged(redis, lookups, tweets):
    await redis.hset(keys.name("tweets"), "sha256", "")
    await redis.hset(keys.version(tweets[1].id), "sha256", "")
    assert not (await lookups.by_name("tweets", seals=NOTHING_SEALED)).is_unchanged


async def test_a_digest_leads_to_its_version_where_there_is_one_alone(client, lookups, make_adapter, tweets):
    digest = tweets[0].digest
    found = await lookups.by_digest(digest)
    assert (found.version_id, pointers.decode(found.pointers).highest) == (tweets[0].id, tweets[1].id)
    content = await lookups.content(digest, chunk=0)
    blob = decode_blob(content.start.facts, sha256=tweets[0].tensors_sha256)
    assert (content.version_id, len(content.start.chunk)) == (tweets[0].id, blob.size_bytes)
    assert (await lookups.content(digest, chunk=1)).start.chunk is None
    await client.register("copies", make_adapter(0))
    assert await lookups.by_digest(digest) is None
    assert await lookups.content(digest, chunk=0) is None


async def test_a_version_without_its_record_is_not_there(redis, lookups, tweets):
    await redis.delete(keys.version(tweets[1].id))
    assert await lookups.by_name("tweets") is None
    assert await lookups.by_id(tweets[1].id) is None
    assert await lookups.by_digest(tweets[1].digest) is None
    assert not (await lookups.content(tweets[1].digest, chunk=0)).record
