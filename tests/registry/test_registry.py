"""The registry over gRPC, with a real store: register, get, list, delete, read."""

import asyncio
import json

import grpc
import numpy as np
import pytest
import structlog
from safetensors.numpy import save
from softprompt_api.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    BaseModelUnknown,
    DataCorrupted,
    InvalidArgument,
    SoftpromptError,
    Unavailable,
)
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.channel import SMALL_FILE_BYTES
from softprompt_api.rpc.status import from_rpc_error
from softprompt_registry import catalog, scripts
from softprompt_registry.server import RegistryServer


async def test_a_registered_adapter_is_told_whole(client, make_adapter):
    adapter = make_adapter().but(header={"labels": {"team": "tweets"}})
    made = await client.register("tweets", adapter)
    assert (made.name, made.version, made.kind) == ("tweets", 1, "PROMPT_TUNING")
    assert (made.num_virtual_tokens, made.hidden_size, made.dtype) == (5, 32, "F32")
    assert (made.size_bytes, made.tensors_sha256) == (len(adapter.tensors), adapter.sha256)
    assert json.loads(made.config_json) == adapter.config
    assert made.base_model.id == "org/Tiny"
    assert dict(made.labels) == {"team": "tweets"}
    assert made.created_at.seconds > 0
    for spelling in ("tweets", "tweets@1", "tweets@latest", made.digest):
        assert await client.get(spelling) == made


async def test_a_second_registration_makes_version_2_and_keeps_version_1(client, make_adapter, content):
    first = await client.register("tweets", make_adapter(1))
    second = await client.register("tweets", make_adapter(2))
    assert (first.version, second.version) == (1, 2)
    assert first.id != second.id
    assert first.digest != second.digest
    assert await client.get("tweets") == second
    assert content(await client.get("tweets@1")) == content(first)
    assert await client.versions("tweets") == [2, 1]


async def test_equal_contents_share_a_digest_and_a_blob_but_not_a_version(client, make_adapter, redis):
    first = await client.register("one", make_adapter())
    second = await client.register("two", make_adapter())
    assert first.digest == second.digest
    assert first.id != second.id
    assert await redis.hget(f"sp:{{blob:{first.tensors_sha256}}}:m", "num_versions") == b"2"
    await client.delete("one")
    assert (await client.get(first.digest)).name == "two"
    assert await client.read(first.digest) == make_adapter().tensors


async def test_the_last_version_of_a_blob_takes_the_blob_along(client, make_adapter, redis):
    for name in ("one", "two"):
        await client.register(name, make_adapter())
    await client.register("two", make_adapter())
    await client.delete("two", 2)
    await client.delete("two")
    assert await redis.keys("*blob*")
    await client.delete("one")
    assert await redis.keys("*blob*") == []
    assert await redis.keys("sp:{v:*") == []
    assert await redis.keys("sp:{d:*") == []


async def test_tensors_are_read_back_whole_and_from_any_offset(client, make_adapter):
    adapter = make_adapter(num_virtual_tokens=20_000)  # 2.4 MiB
    made = await client.register("big", adapter.but(chunk_bytes=77_777))
    assert await client.read(made.digest) == adapter.tensors
    for offset in (1, 2**20 - 1, 2**20, 2**20 + 1, len(adapter.tensors) - 1, len(adapter.tensors)):
        assert await client.read(made.digest, offset) == adapter.tensors[offset:]
    for offset in (-1, len(adapter.tensors) + 1):
        with pytest.raises(InvalidArgument) as refused:
            await client.read(made.digest, offset)
        assert refused.value.field == "offset"


async def test_the_first_piece_of_a_file_tells_what_it_is_of(client, make_adapter, content):
    adapter = make_adapter(num_virtual_tokens=20_000)
    made = await client.register("big", adapter)
    responses = [one async for one in client.stub.ReadTensors([pb.ReadTensorsRequest(digest=made.digest)])]
    assert max(len(one.chunk.data) for one in responses) == 2**18
    assert b"".join(one.chunk.data for one in responses) == adapter.tensors
    assert responses[0].adapter == content(made)
    assert not any(one.HasField("adapter") for one in responses[1:])


async def test_a_name_is_told_with_its_file_where_that_is_small(client, make_adapter):
    # Of 32 values of four bytes each; a file has a header too.
    sizes = {"small": 8, "large": SMALL_FILE_BYTES // 128}
    adapters = {name: make_adapter(num_virtual_tokens=size) for name, size in sizes.items()}
    for name, adapter in adapters.items():
        await client.register(name, adapter)
    await client.set_alias("small", "prod", 1)
    spelled = ["small", "small@1", "small@prod", "large"]
    requests = [pb.ReadTensorsRequest(adapter=spelling) for spelling in spelled]
    told = [response async for response in client.stub.ReadTensors(requests)]
    for spelling, response in zip(spelled, told, strict=True):
        adapter = adapters[spelling.partition("@")[0]]
        assert response.adapter == await client.get(spelling)
        assert response.size_bytes == len(adapter.tensors)
        assert response.chunk == pb.Chunk(data=adapter.tensors if spelling != "large" else b"")


@pytest.mark.parametrize(
    ("request_", "error", "field", "message"),
    [
        ({"adapter": "nobody"}, AdapterNotFound, "adapter", "nobody"),
        ({"adapter": "Tweets"}, InvalidArgument, "adapter", "not an adapter name"),
        ({"adapter": "sha256:" + "0" * 64}, InvalidArgument, "adapter", "a name is expected here"),
        ({"adapter": "tweets", "digest": "sha256:" + "0" * 64}, InvalidArgument, "adapter", "without a digest"),
        ({"adapter": "tweets", "offset": 1}, InvalidArgument, "adapter", "without a digest"),
        ({"adapter": "tweets", "base_model_id": "x"}, InvalidArgument, "adapter", "without a digest"),
    ],
)
async def test_a_name_that_makes_no_sense_ends_the_stream(client, make_adapter, request_, error, field, message):
    await client.register("tweets", make_adapter())
    with pytest.raises(grpc.RpcError) as ended:
        async for _ in client.stub.ReadTensors([pb.ReadTensorsRequest(**request_)]):
            pass
    told = from_rpc_error(ended.value)
    assert (type(told), told.field) == (error, field)
    assert message in told.message


async def test_a_name_whose_file_is_damaged_is_data_loss(client, make_adapter, redis):
    made = await client.register("tweets", make_adapter())
    await redis.setrange(f"sp:{{blob:{made.tensors_sha256}}}:c:0", 100, b"\xff\xff")
    with pytest.raises(grpc.RpcError) as ended:
        async for _ in client.stub.ReadTensors([pb.ReadTensorsRequest(adapter="tweets")]):
            pass
    assert type(from_rpc_error(ended.value)) is DataCorrupted


async def test_files_come_over_one_stream_in_the_order_in_which_they_are_asked_for(client, make_adapter):
    adapters = [make_adapter(num_virtual_tokens=size) for size in (8, 20_000, 4)]
    digests = [(await client.register(f"a{number}", one)).digest for number, one in enumerate(adapters)]
    requests = [pb.ReadTensorsRequest(digest=digest) for digest in digests]
    data: dict[str, bytes] = {}
    async for response in client.stub.ReadTensors(requests):
        if response.HasField("adapter"):
            digest = response.adapter.digest
        data[digest] = data.get(digest, b"") + response.chunk.data
    assert list(data.items()) == [(digest, one.tensors) for digest, one in zip(digests, adapters, strict=True)]


async def test_a_file_that_is_not_there_ends_the_stream_behind_those_before_it(client, make_adapter):
    made = await client.register("tweets", adapter := make_adapter())
    unknown = pb.ReadTensorsRequest(digest="sha256:" + "0" * 64)
    call = client.stub.ReadTensors([pb.ReadTensorsRequest(digest=made.digest), unknown])
    assert (await call.read()).chunk.data == adapter.tensors
    with pytest.raises(grpc.RpcError) as ended:
        await call.read()
    assert type(from_rpc_error(ended.value)) is AdapterNotFound


async def test_a_stream_on_which_nothing_is_asked_does_not_hold_up_a_stop(client, settings, connect, make_adapter):
    made = await client.register("tweets", make_adapter())
    async with RegistryServer(settings.model_copy(update={"grace_s": 600.0})) as server:
        call = connect(server.port).stub.ReadTensors()
        await call.write(pb.ReadTensorsRequest(digest=made.digest))
        assert (await call.read()).chunk.data
    with pytest.raises(grpc.RpcError) as ended:
        await call.read()
    assert type(from_rpc_error(ended.value)) is Unavailable


async def test_a_chunk_may_have_any_size(client, make_adapter):
    adapter = make_adapter()
    digests = {(await client.register("tiny", adapter.but(chunk_bytes=size))).digest for size in (1, 7, 8, 4096)}
    assert len(digests) == 1


async def test_a_flipped_byte_in_the_store_is_data_loss_and_heals_with_a_new_registration(
    client, make_adapter, redis
):
    adapter = make_adapter(num_virtual_tokens=20_000)
    made = await client.register("big", adapter)
    await redis.setrange(f"sp:{{blob:{made.tensors_sha256}}}:c:1", 500, b"\xff\xff")
    with pytest.raises(DataCorrupted):
        await client.read(made.digest)
    with pytest.raises(DataCorrupted):
        await client.read(made.digest, 2**20 + 5)
    assert await client.read(made.digest, 2 * 2**20) == adapter.tensors[2 * 2**20 :]
    await client.register("healed", adapter)
    assert await client.read(made.digest) == adapter.tensors


async def test_a_lost_chunk_is_data_loss_and_a_deleted_adapter_is_not_found(client, make_adapter, redis):
    made = await client.register("tweets", make_adapter())
    await redis.delete(f"sp:{{blob:{made.tensors_sha256}}}:c:0")
    with pytest.raises(DataCorrupted):
        await client.read(made.digest)
    await redis.delete(f"sp:{{blob:{made.tensors_sha256}}}:m")
    with pytest.raises(DataCorrupted):
        await client.read(made.digest)
    await client.delete("tweets")
    with pytest.raises(AdapterNotFound):
        await client.read(made.digest)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("sp:{{v:{id}}}", "digest"),
        ("sp:{{v:{id}}}", "tensors_sha256"),
        ("sp:{{blob:{tensors_sha256}}}:m", "sha256"),
        ("sp:{{blob:{tensors_sha256}}}:m", "size_bytes"),
        ("sp:{{blob:{tensors_sha256}}}:m", "num_versions"),
    ],
)
@pytest.mark.parametrize("number", [None, 1])
async def test_what_is_damaged_can_be_deleted_and_made_anew(client, make_adapter, redis, key, field, number):
    adapter = make_adapter()
    made = await client.register("tweets", adapter)
    key = key.format(id=made.id, tensors_sha256=made.tensors_sha256)
    await redis.hset(key, field, b"\xff" + (await redis.hget(key, field))[1:])
    await client.delete("tweets", number)
    assert await client.names() == []
    made = await client.register("tweets", adapter)
    assert made.version == 2
    assert await client.get("tweets") == await client.get(made.digest) == made
    assert await client.read(made.digest) == adapter.tensors


async def test_what_is_read_and_registered_anew_does_not_depend_on_who_counts_its_users(
    client, make_adapter, redis
):
    adapter = make_adapter()
    made = await client.register("tweets", adapter)
    await redis.hset(f"sp:{{blob:{made.tensors_sha256}}}:m", "num_versions", "x1")
    assert await client.read(made.digest) == adapter.tensors
    assert (await client.register("sms", adapter)).digest == made.digest
    await client.delete("tweets")
    assert await client.read(made.digest) == adapter.tensors


async def test_a_name_with_many_versions_is_deleted_with_all_that_they_hold(
    client, make_adapter, redis, monkeypatch
):
    monkeypatch.setattr(scripts, "_MAX_FIELDS", 2)
    shared = make_adapter(9)
    for adapter in (*map(make_adapter, range(3)), shared, shared):
        await client.register("tweets", adapter)
    kept = await client.register("sms", shared)
    await client.delete("tweets")
    assert await client.read(kept.digest) == shared.tensors
    await client.delete("sms")
    assert [*await redis.keys("*blob*"), *await redis.keys("*{v:*")] == []


async def test_a_blob_whose_facts_were_damaged_is_left_behind_by_nobody(client, make_adapter, redis):
    adapter = make_adapter(num_virtual_tokens=20_000)
    blob = f"sp:{{blob:{adapter.sha256}}}:m"
    for name in ("tweets", "sms"):
        await client.register(name, adapter)
    await redis.hset(blob, "sha256", b"\xff")
    await client.delete("tweets")
    assert await redis.hget(blob, "num_versions") == b"1"
    await client.delete("sms", 1)
    assert await redis.keys("*blob*") == []


async def test_deleting_while_others_read_ends_their_reading_cleanly(client, make_adapter):
    adapter = make_adapter(num_virtual_tokens=150_000)  # 18 MiB: more than fits on the way
    made = await client.register("big", adapter)
    call = client.stub.ReadTensors([pb.ReadTensorsRequest(digest=made.digest)])
    data, end = (await call.read()).chunk.data, None
    await client.delete("big")
    with pytest.raises(AdapterNotFound):
        await client.read(made.digest)
    try:
        while (response := await call.read()) != grpc.aio.EOF:
            data += response.chunk.data
    except grpc.RpcError as error:
        end = from_rpc_error(error)
    assert adapter.tensors.startswith(data)
    assert (end is None) == (data == adapter.tensors)
    assert end is None or type(end) is AdapterNotFound


async def test_a_swapped_record_is_noticed(client, make_adapter, redis):
    one = await client.register("one", make_adapter(1))
    two = await client.register("two", make_adapter(2))
    await redis.copy(f"sp:{{v:{one.id}}}", f"sp:{{v:{two.id}}}", replace=True)
    with pytest.raises(DataCorrupted):
        await client.get("two")
    await client.delete("two")
    assert await client.names() == ["one"]


async def test_an_unknown_adapter_is_not_found_with_a_near_name(client, make_adapter):
    await client.register("tweet_adapter", make_adapter())
    with pytest.raises(AdapterNotFound) as missing:
        await client.get("twet_adapter")
    assert missing.value.details == {"did_you_mean": "tweet_adapter"}
    assert "did you mean 'tweet_adapter'" in missing.value.message
    with pytest.raises(AdapterNotFound) as missing:
        await client.get("zzz")
    assert missing.value.details == {}
    with pytest.raises(AdapterNotFound) as missing:
        await client.get("tweet_adapter@7")
    assert "tweet_adapter alone stands for version 1" in missing.value.message
    with pytest.raises(AdapterNotFound):
        await client.get("sha256:" + "0" * 64)


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "../x",
        "a%2e",
        "A",
        "a\x00",
        "a\n",
        "-a",
        "a" * 129,
        "🦄",
        "a@0",
        "a@-1",
        "a@1.0",
        "sha256:zz",
        "latest",
    ],
)
async def test_a_bad_spelling_is_refused(client, spelling):
    with pytest.raises(InvalidArgument) as refused:
        await client.get(spelling)
    assert refused.value.field == "adapter"


async def test_after_deletion_the_highest_version_left_is_the_latest(client, make_adapter):
    for seed in (1, 2, 3):
        await client.register("tweets", make_adapter(seed))
    await client.delete("tweets", 3)
    assert (await client.get("tweets")).version == 2
    await client.delete("tweets", 1)
    assert await client.versions("tweets") == [2]
    await client.delete("tweets", 2)
    with pytest.raises(AdapterNotFound):
        await client.get("tweets")
    assert await client.names() == []


async def test_version_numbers_and_ids_are_never_used_again(client, make_adapter):
    ids = [(await client.register("tweets", make_adapter(1))).id]
    await client.delete("tweets", 1)
    again = await client.register("tweets", make_adapter(1))
    ids.append(again.id)
    assert again.version == 2
    await client.delete("tweets")
    third = await client.register("tweets", make_adapter(1))
    assert third.version == 3
    assert len({*ids, third.id}) == 3


async def test_deleting_what_is_not_there_is_not_found(client, make_adapter):
    await client.register("tweets", make_adapter())
    for name, version in (("tweet", None), ("tweets", 2), ("tweet", 1)):
        with pytest.raises(AdapterNotFound):
            await client.delete(name, version)
    for version in (0, -1):
        with pytest.raises(InvalidArgument):
            await client.delete("tweets", version)


async def test_names_are_listed_in_pages_in_order(client, make_adapter):
    names = sorted(f"{letter}{number}" for letter in "ab" for number in range(25))
    for name in names:
        await client.register(name, make_adapter())
    listed, token = [], ""
    while True:
        page = await client.stub.ListAdapters(pb.ListAdaptersRequest(page_size=10, page_token=token))
        assert page.total_size == 50
        assert len(page.adapters) == 10
        listed += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert listed == names
    assert await client.names() == names
    assert await client.names(name_prefix="b") == names[25:]
    assert await client.names(name_prefix="b2") == [name for name in names if name.startswith("b2")]
    assert await client.names(name_prefix="c") == []


async def test_versions_are_listed_in_pages_newest_first(client, make_adapter):
    for _ in range(5):
        await client.register("tweets", make_adapter())
    first = await client.stub.ListVersions(pb.ListVersionsRequest(name="tweets", page_size=3))
    await client.delete("tweets", 2)
    rest = await client.stub.ListVersions(
        pb.ListVersionsRequest(name="tweets", page_size=3, page_token=first.next_page_token)
    )
    assert [adapter.version for adapter in first.versions] == [5, 4, 3]
    assert [adapter.version for adapter in rest.versions] == [1]
    assert rest.next_page_token == ""
    with pytest.raises(AdapterNotFound):
        await client.versions("nobody")


async def test_names_are_listed_by_the_labels_of_their_latest_version(client, make_adapter):
    adapter = make_adapter()
    for number in range(12):
        labels = {"team": "a" if number % 3 else "b", "stage": "prod" if number % 2 else "test"}
        await client.register(f"n{number:02}", adapter.but(header={"labels": labels}))
    assert await client.names(labels={"team": "b"}) == ["n00", "n03", "n06", "n09"]
    assert await client.names(labels={"team": "b", "stage": "prod"}) == ["n03", "n09"]
    assert await client.names(labels={"team": "c"}) == await client.names(labels={"stage": ""}) == []
    await client.register("n03", make_adapter(1))  # whose newer version has none
    assert await client.names(labels={"team": "b"}) == ["n00", "n06", "n09"]
    listed, token = [], ""
    while True:
        query = pb.ListAdaptersRequest(page_size=1, page_token=token, labels={"team": "b"}, descending=True)
        page = await client.answer(client.stub.ListAdapters(query))
        listed += [adapter.name for adapter in page.adapters]
        assert len(page.adapters) <= 1
        assert page.total_size == 12
        token = page.next_page_token
        if not token:
            break
    assert listed == ["n09", "n06", "n00"]
    with pytest.raises(InvalidArgument) as refused:
        await client.names(labels={"": "x"})
    assert refused.value.field == "labels"


async def test_names_are_listed_from_either_end(client, make_adapter):
    names = ["a", "ab", "b1", "b2", "c"]
    for name in names:
        await client.register(name, make_adapter())
    assert await client.names(descending=True) == names[::-1]
    assert await client.names(descending=True, name_prefix="b") == ["b2", "b1"]
    first = await client.stub.ListAdapters(pb.ListAdaptersRequest(page_size=2, descending=True))
    rest = pb.ListAdaptersRequest(page_token=first.next_page_token, descending=True)
    assert await client.names(page_size=2, descending=True) == ["c", "b2"]
    assert [each.name for each in (await client.stub.ListAdapters(rest)).adapters] == ["b1", "ab", "a"]
    for other in ({}, {"descending": True, "labels": {"a": "b"}}):
        with pytest.raises(InvalidArgument) as refused:
            await client.names(page_token=first.next_page_token, **other)
        assert refused.value.field == "page_token"


async def test_a_page_never_outgrows_a_message(client, make_adapter):
    big = make_adapter()
    big = big.but(config={**big.config, "prompt_tuning_init_text": "x" * 900_000})
    for number in range(5):
        await client.register(f"big{number}", big)
    first = await client.stub.ListAdapters(pb.ListAdaptersRequest())
    assert 1 <= len(first.adapters) < 5
    rest = await client.stub.ListAdapters(pb.ListAdaptersRequest(page_token=first.next_page_token))
    assert [adapter.name for adapter in (*first.adapters, *rest.adapters)] == [
        f"big{number}" for number in range(5)
    ]


async def test_labels_do_not_make_a_page_outgrow_a_message(client, make_adapter):
    labels = {f"{number:02}" + 62 * "😀": 256 * "😀" for number in range(32)}
    adapter = make_adapter().but(header={"labels": labels})
    for numbers in (range(55), range(55, 110)):  # more at once than the registry takes would be refused
        await asyncio.gather(*(client.register(f"a{number:03}", adapter) for number in numbers))
    listed, token = [], ""
    while True:
        query = pb.ListAdaptersRequest(page_size=1000, page_token=token)
        page = await client.answer(client.stub.ListAdapters(query))
        assert page.ByteSize() < 3 * 2**20
        listed += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert listed == [f"a{number:03}" for number in range(110)]


async def test_a_page_token_of_another_list_is_refused(client, make_adapter):
    for name in ("a1", "a2"):
        await client.register(name, make_adapter())
    token = (await client.stub.ListAdapters(pb.ListAdaptersRequest(page_size=1))).next_page_token
    for query in ({"page_token": token, "name_prefix": "a"}, {"page_token": "nonsense"}, {"page_token": "é"}):
        with pytest.raises(InvalidArgument) as refused:
            await client.names(**query)
        assert refused.value.field == "page_token"
    forged = pb.ListVersionsRequest(name="a1", page_token=catalog.page_token("versions a1", "one"))
    with pytest.raises(InvalidArgument) as refused:
        await client.answer(client.stub.ListVersions(forged))
    assert refused.value.field == "page_token"
    for size in (-1, 1001):
        with pytest.raises(InvalidArgument) as refused:
            await client.names(page_size=size)
        assert refused.value.field == "page_size"


async def test_without_a_base_model_a_registration_is_told_what_to_do(bare_client, make_adapter):
    with pytest.raises(BaseModelUnknown) as refused:
        await bare_client.register("tweets", make_adapter())
    assert "start the inference service" in refused.value.message


async def test_the_base_model_is_the_only_one_or_must_be_named(client, make_adapter):
    other = pb.BaseModel(id="org/Wide", hidden_size=64)
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=other))
    with pytest.raises(InvalidArgument) as refused:
        await client.register("tweets", make_adapter())
    assert refused.value.field == "base_model_id"
    wide = make_adapter(hidden_size=64).but(header={"base_model_id": "org/Wide"})
    assert (await client.register("wide", wide)).base_model == other
    with pytest.raises(BaseModelUnknown):
        await client.register("tweets", make_adapter().but(header={"base_model_id": "org/None"}))
    with pytest.raises(AdapterInvalid) as refused:
        await client.register("wide", make_adapter().but(header={"base_model_id": "org/Wide"}))
    assert refused.value.field == "config.token_dim"
    known = await client.stub.ListBaseModels(pb.ListBaseModelsRequest())
    assert [model.id for model in known.base_models] == ["org/Tiny", "org/Wide"]


async def test_a_base_model_that_nobody_announces_any_more_need_not_be_told_apart(client, make_adapter, redis):
    other = pb.BaseModel(id="org/Wide", hidden_size=64)
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=other))
    await redis.zincrby("sp:base:announced", -61, "org/Tiny")
    wide = make_adapter(hidden_size=64)
    assert (await client.register("wide", wide)).base_model == other
    assert (await client.register("tiny", make_adapter().but(header={"base_model_id": "org/Tiny"}))).version == 1
    await redis.zincrby("sp:base:announced", -61, "org/Wide")
    with pytest.raises(InvalidArgument, match="several base models"):
        await client.register("wide", wide)


async def test_of_equal_contents_the_one_for_the_base_model_of_whoever_reads_is_told(client, make_adapter, redis):
    bases = [*(f"org/{number}" for number in range(4)), "org/Tiny"]
    for base in bases[:-1]:
        await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=pb.BaseModel(id=base, hidden_size=32)))
    made = {}
    for number, base in enumerate(bases):
        adapter = make_adapter().but(header={"base_model_id": base})
        made[base] = await client.register(f"tenant{number}/tweets", adapter)
    digest = made["org/Tiny"].digest

    async def told(base: str) -> str:
        request = pb.ReadTensorsRequest(digest=digest, base_model_id=base)
        [answer] = [answer async for answer in client.stub.ReadTensors([request])]
        return answer.adapter.name

    assert [await told(base) for base in bases] == [version.name for version in made.values()]
    assert await told("") == await told("org/None") == "tenant0/tweets"
    await redis.hset(f"sp:{{v:{made['org/1'].id}}}", "base_model", "{")
    assert await told("org/2") == "tenant2/tweets"


async def test_changes_by_whoever_calls_are_audited_however_they_end(client, make_adapter):
    with structlog.testing.capture_logs() as logged:
        await client.register("tweets", make_adapter())
        await client.set_alias("tweets", "prod", 1)
        await client.set_alias("tweets", "prod", 0)
        await client.update("tweets@1", "pinned", pinned=True)
        for call in (
            client.delete("tweets"),
            client.delete("acme/tweets", 2),
            client.register("..", make_adapter()),
        ):
            with pytest.raises(SoftpromptError):
                await call
        with pytest.raises(SoftpromptError):
            await client.answer(client.stub.ImportAdapter(pb.ImportAdapterRequest(name="sms", source="file:///x")))
    lines = [line for line in logged if line["event"] == "audit"]
    assert [(line["action"], line["adapter"], line["outcome"]) for line in lines] == [
        ("adapter.register", "'tweets'", "done"),
        ("alias.set", "'tweets'", "done"),
        ("alias.remove", "'tweets'", "done"),
        ("adapter.update", "'tweets@1'", "done"),
        ("adapter.delete", "'tweets'", "ADAPTER_IN_USE"),
        ("adapter.delete", "'acme/tweets@2'", "ADAPTER_NOT_FOUND"),
        ("adapter.register", "'..'", "INVALID_ARGUMENT"),
        ("adapter.import", "'sms'", "UNSUPPORTED"),
    ]
    assert all(line["peer"] for line in lines)


@pytest.mark.parametrize("damaged", ["{", "[]", "5", "{}", '{"id": "org/Wide", "hidden_size": "x"}', "wrong id"])
async def test_a_damaged_base_model_takes_no_other_along(client, make_adapter, redis, damaged):
    stored = json.loads(await redis.hget("sp:base", "org/Tiny"))
    await redis.hset("sp:base", "org/Wide", json.dumps(stored) if damaged == "wrong id" else damaged)
    # As a later version of this software may write it.
    await redis.hset("sp:base", "org/Tiny", json.dumps({**stored, "of_the_future": 1}))
    known = await client.answer(client.stub.ListBaseModels(pb.ListBaseModelsRequest()))
    assert [model.id for model in known.base_models] == ["org/Tiny"]
    assert (await client.register("tweets", make_adapter())).base_model.id == "org/Tiny"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"id": ""}, "base_model.id"),
        ({"id": "a\nb"}, "base_model.id"),
        ({"id": "x" * 257}, "base_model.id"),
        ({"hidden_size": 0}, "base_model.hidden_size"),
        ({"num_layers": -1}, "base_model.num_layers"),
        ({"dtype": "int4"}, "base_model.dtype"),
        ({"architecture": "x" * 257}, "base_model.architecture"),
        ({"tokenizer_sha256": "x" * 257}, "base_model.tokenizer_sha256"),
        ({"no_key_values": "x" * 257}, "base_model.no_key_values"),
    ],
)
async def test_a_base_model_without_a_usable_fingerprint_is_refused(client, fields, field):
    model = pb.BaseModel(**{"id": "org/Other", "hidden_size": 8, **fields})
    with pytest.raises(InvalidArgument) as refused:
        await client.answer(client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=model)))
    assert refused.value.field == field


async def test_the_base_models_id_is_no_adapter_name(client, make_adapter):
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=pb.BaseModel(id="Tiny", hidden_size=32)))
    with pytest.raises(InvalidArgument) as refused:
        await client.register("tiny", make_adapter().but(header={"base_model_id": "Tiny"}))
    assert refused.value.field == "name"


async def test_more_virtual_tokens_than_the_base_model_takes_are_refused(client, make_adapter):
    limited = pb.BaseModel(id="org/Tiny", hidden_size=32, max_virtual_tokens=4)
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=limited))
    with pytest.raises(AdapterInvalid) as refused:
        await client.register("tweets", make_adapter())
    assert refused.value.field == "config.num_virtual_tokens"


async def test_training_on_another_model_is_a_warning(client, make_adapter):
    adapter = make_adapter()
    adapter = adapter.but(config={**adapter.config, "base_model_name_or_path": "/home/me/Llama-7B/"})
    response = await client.stub.RegisterAdapter(iter(adapter.requests("tweets")))
    assert len(response.warnings) == 1
    assert "Llama-7B" in response.warnings[0]


async def test_one_idempotency_key_makes_one_version(client, make_adapter):
    adapter = make_adapter(num_virtual_tokens=100_000).but(header={"idempotency_key": "k"})
    first = await client.register("tweets", adapter)
    assert await client.register("tweets", adapter) == first
    assert await client.versions("tweets") == [1]
    with pytest.raises(AdapterConflict) as refused:
        await client.register("tweets", make_adapter(2).but(header={"idempotency_key": "k"}))
    assert refused.value.field == "idempotency_key"
    with pytest.raises(AdapterConflict):
        await client.register("other", adapter)
    await client.delete("tweets")
    with pytest.raises(AdapterConflict):
        await client.register("tweets", adapter)


async def test_an_attempt_with_a_key_may_name_the_base_model_that_another_left_out(client, make_adapter):
    adapter = make_adapter()
    unsaid, said, another = (
        adapter.but(header={"idempotency_key": "k", "base_model_id": model_id})
        for model_id in ("", "org/Tiny", "org/Other")
    )
    first = await client.register("tweets", unsaid)
    assert await client.register("tweets", said) == first
    assert await client.register("tweets", unsaid) == first
    with pytest.raises(AdapterConflict) as refused:
        await client.register("tweets", another)
    assert refused.value.field == "idempotency_key"


async def test_registrations_with_keys_do_not_wait_for_each_others_connections(
    client, make_adapter, monkeypatch, settings, connect
):
    monkeypatch.setattr("softprompt_registry.server._MAX_CONNECTIONS", 1)
    adapter = make_adapter().but(header={"idempotency_key": "k"})
    async with RegistryServer(settings.model_copy(update={"store_timeout_s": 5.0})) as server:
        narrow = connect(server.port)
        made = await asyncio.gather(*(narrow.register("tweets", adapter) for _ in range(8)))
        await narrow.channel.close()
    assert {version.version for version in made} == {1}


async def test_a_raced_idempotency_key_makes_one_version(client, make_adapter, redis):
    adapter = make_adapter().but(header={"idempotency_key": "k"})
    made = await asyncio.gather(*(client.register("tweets", adapter) for _ in range(16)))
    assert {version.version for version in made} == {1}
    assert await client.versions("tweets") == [1]
    assert await redis.hget(f"sp:{{blob:{adapter.sha256}}}:m", "num_versions") == b"1"
    assert await redis.keys("*:u:*") == []


async def test_writers_on_one_name_get_distinct_versions_without_a_gap(client, make_adapter, content):
    made = await asyncio.gather(*(client.register("tweets", make_adapter(seed % 5)) for seed in range(40)))
    assert sorted(version.version for version in made) == list(range(1, 41))
    assert len({version.id for version in made}) == 40
    assert await client.versions("tweets") == list(range(40, 0, -1))
    for version in made:
        assert content(await client.get(f"tweets@{version.version}")) == content(version)


async def test_writers_and_deleters_of_equal_contents_leave_no_blob_behind(client, make_adapter, redis):
    async def come_and_go(name: str) -> None:
        for _ in range(5):
            version = await client.register(name, make_adapter())
            assert await client.read(version.digest) == make_adapter().tensors
            await client.delete(name, version.version)

    await asyncio.gather(*(come_and_go(f"name{number}") for number in range(8)))
    assert await redis.keys("*blob*") == []
    assert await client.names() == []


@pytest.mark.parametrize(
    ("changes", "shapes", "kind", "expected"),
    [
        (
            {"peft_type": "PREFIX_TUNING", "token_dim": 16, "num_layers": 2, "num_attention_heads": 2},
            {"prompt_embeddings": (5, 64)},
            "PREFIX_TUNING",
            (5, 0, 0, 0),
        ),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3, "num_ranks": 1},
            {"prompt_embeddings": (5, 32), "prefix_task_cols": (3, 5, 1), "prefix_task_rows": (3, 1, 32)},
            "MULTITASK_PROMPT_TUNING",
            (5, 32, 3, 0),
        ),
        (
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "num_virtual_tokens": None, "token_dim": None},
            {f"base_model.model.layers.0.q_proj.lora_{one}.weight": (4, 4) for one in "AB"},
            "LORA",
            (0, 0, 0, 4),
        ),
    ],
)
async def test_every_kind_is_stored_with_what_requests_must_know(
    client, make_adapter, changes, shapes, kind, expected
):
    tensors = save({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": 32, **changes}
    made = await client.register("one", make_adapter().but(config=config, tensors=tensors))
    assert made.kind == kind
    assert (made.num_virtual_tokens, made.hidden_size, made.num_tasks, made.rank) == expected
    assert await client.get("one") == made
    assert await client.read(made.digest) == tensors


async def test_a_multitask_adapter_is_refused_for_one_task_whose_prompt_cannot_be_served(client, make_adapter):
    model = pb.BaseModel(id="org/Tiny", hidden_size=32, dtype="float16")
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=model))
    cols = np.ones((3, 5, 1), np.float32)
    cols[2] = 300
    tensors = {
        "prompt_embeddings": np.full((5, 32), 300, np.float32),
        "prefix_task_cols": cols,
        "prefix_task_rows": np.ones((3, 1, 32), np.float32),
    }
    config = {
        "peft_type": "MULTITASK_PROMPT_TUNING",
        "num_virtual_tokens": 5,
        "token_dim": 32,
        "num_tasks": 3,
        "num_ranks": 1,
    }
    with pytest.raises(
        AdapterInvalid, match="has 90000 at row 0, column 0, which is infinite in float16"
    ) as refused:
        await client.register("one", make_adapter().but(config=config, tensors=save(tensors)))
    assert refused.value.field == "tensors.prompt of task 2"
    assert await client.names() == []


async def test_keys_and_values_are_refused_for_a_model_that_cannot_take_them(client, make_adapter):
    reason = "Gemma2ForCausalLM has sliding-window layers"
    model = pb.BaseModel(id="org/Tiny", hidden_size=32, no_key_values=reason)
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=model))
    config = {
        "peft_type": "CARTRIDGE",
        "num_virtual_tokens": 5,
        "token_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    with pytest.raises(AdapterInvalid, match=reason) as refused:
        await client.register("one", make_adapter().but(config=config))
    assert refused.value.field == "config.peft_type"


@pytest.mark.parametrize(("max_lora_rank", "rank"), [(3, 4), (0, 65)])
async def test_a_lora_above_the_rank_that_the_model_is_served_with_is_refused(
    client, make_adapter, max_lora_rank, rank
):
    model = pb.BaseModel(id="org/Tiny", hidden_size=32, max_lora_rank=max_lora_rank)
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=model))
    tensors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": np.ones((rank, 4), np.float32),
        "base_model.model.layers.0.q_proj.lora_B.weight": np.ones((4, rank), np.float32),
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8}
    with pytest.raises(AdapterInvalid, match=f"rank {rank}; at most {max_lora_rank or 64}") as refused:
        await client.register("one", make_adapter().but(config=config, tensors=save(tensors)))
    assert refused.value.field == "config.r"


async def test_versions_of_before_there_were_tasks_and_ranks_are_read(client, make_adapter, redis):
    made = await client.register("old", make_adapter())
    await redis.hdel(f"sp:{{v:{made.id}}}", "num_tasks", "rank", "pinned", "sha256")
    assert await client.get("old") == made
