"""A flipped bit, in the store or on the wire, is found out and costs its own adapter alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from softprompt_api.errors import AdapterNotFound, DataCorrupted, SoftpromptError
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_inference.adapters import source as source_module
from softprompt_inference.adapters.source import AdapterSource

pytestmark = pytest.mark.timeout(1800)


def flipped(value: bytes, rng: random.Random) -> bytes:
    """The bytes with one bit flipped."""
    position = rng.randrange(8 * len(value))
    changed = bytearray(value)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


async def flip(look: Any, key: bytes, rng: random.Random) -> Callable[[], Any]:
    """Flip one bit of what a key holds; the answer puts it back."""
    if await look.type(key) == b"hash":
        field, value = rng.choice(sorted((await look.hgetall(key)).items()))
        await look.hset(key, field, flipped(value, rng))
        return lambda: look.hset(key, field, value)
    value = await look.get(key)
    await look.set(key, flipped(value, rng))
    return lambda: look.set(key, value)


@pytest.mark.parametrize("flips", [150, pytest.param(5_000, marks=pytest.mark.chaos)])
async def test_a_bit_that_flips_in_the_store_costs_its_own_adapter_alone(
    make_store: Any, serve: Any, connect: Any, look_into: Any, adapter: Any, flips: int
) -> None:
    rng = random.Random(flips)
    store = make_store()
    client, look = connect(f"127.0.0.1:{(await serve(store.url)).port}"), look_into(store)
    await client.put_base_model()
    others = {name: (await client.register(name, adapter(seed)), adapter(seed)) for seed, name in enumerate("abc")}
    files = adapter(9, num_virtual_tokens=40_000)  # two chunks
    await client.register("victim", files)
    await client.set_alias("victim", "prod", 1)
    made = await client.get("victim")
    keys = [f"sp:{{v:{made.id}}}", "sp:{n:victim}:a", *await look.keys(f"sp:{{blob:{made.tensors_sha256}}}:*")]
    assert len(keys) == 5

    async def victim_is_whole(spelling: str) -> bool:
        try:
            found = await client.get(spelling)
            data = await client.read(found.digest)
        except (DataCorrupted, AdapterNotFound):
            return False
        found.aliases[:] = made.aliases  # a damaged alias costs the alias
        assert (found, data) == (made, files.tensors), "damage was served"
        return True

    num_found_out = 0
    for _ in range(flips):
        put_back = await flip(look, rng.choice(keys), rng)
        num_found_out += not all([await victim_is_whole(spelling) for spelling in ("victim@prod", "victim@1")])
        for name, (version, other) in others.items():
            assert await client.get(name) == version
            assert await client.read(version.digest) == other.tensors
        assert set(await client.names()) - {"victim"} == set(others)
        await put_back()
    # A count of users, or a size, can change without harm to what is read.
    assert num_found_out > flips / 2
    assert await victim_is_whole("victim")


async def test_a_damaged_version_does_not_hold_up_watchers(
    make_store: Any, serve: Any, connect: Any, look_into: Any, adapter: Any
) -> None:
    store = make_store()
    client, look = connect(f"127.0.0.1:{(await serve(store.url)).port}"), look_into(store)
    await client.put_base_model()
    damaged = await client.register("damaged", adapter(1))
    await client.register("whole", adapter(2))
    await look.hset(f"sp:{{v:{damaged.id}}}", "digest", "sha256:" + "0" * 64)
    with pytest.raises(DataCorrupted):
        await client.get("damaged")
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor="0-0"), timeout=20)
    told = [(await call.read()).adapter for _ in range(3)]
    call.cancel()
    assert [version.name for version in told] == ["", "damaged", "whole"]  # a heartbeat first
    assert [bool(version.digest) for version in told] == [False, False, True]
    assert await client.versions("damaged") == {}
    # It can be deleted, and made anew.
    await client.delete("damaged", 1)
    assert (await client.register("damaged", adapter(1))).version == 2
    assert await client.names() == ["damaged", "whole"]


@pytest.mark.parametrize("flips", [25, pytest.param(1000, marks=pytest.mark.chaos)])
async def test_a_bit_that_flips_on_the_wire_never_becomes_an_adapter(
    make_store: Any,
    serve: Any,
    connect: Any,
    tcp_link: Any,
    adapter: Any,
    flips: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A flip in a frame's length makes gRPC wait for bytes that never come.
    monkeypatch.setattr(source_module, "FETCH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(source_module, "RESOLVE_TIMEOUT_S", 2.0)
    monkeypatch.setattr(source_module, "RESUME_DELAYS_S", ())
    rng = random.Random(flips)
    store = make_store()
    port = (await serve(store.url)).port
    client = connect(f"127.0.0.1:{port}")
    await client.put_base_model()
    files = adapter(9, num_virtual_tokens=2_000)  # 64 kB
    made = await client.register("victim", files)
    whole = await AdapterSource(client.stub, made.base_model).fetch(made.digest)

    async def fetched(flip_down_at: int | None) -> bool:
        async with tcp_link(port, flip_down_at=flip_down_at) as (link_port, link):
            source = AdapterSource(connect(f"127.0.0.1:{link_port}").stub, made.base_model)
            try:
                # The spelling is shown in lists, and nothing is computed with it.
                found = replace(await source.fetch(made.digest), spelling=whole.spelling)
                assert found == whole, "damage was taken for an adapter"
            except SoftpromptError:
                return False
            assert link.num_flipped == (flip_down_at is not None)
            return True

    assert await fetched(None)
    outcomes = [await fetched(rng.randrange(len(files.tensors))) for _ in range(flips)]
    assert outcomes.count(False) > flips / 2
