"""What an upload may not be, and what is left of one that failed: nothing."""

import asyncio
import gc
import hashlib
import json
import pickle
import struct
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.errors import AdapterInvalid, AdapterNotFound, DeadlineExceeded, InvalidArgument, Overloaded
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry import uploads
from softprompt_registry.server import RegistryServer

ROWS = np.ones((5, 32), dtype=np.float32)


def safetensors_of(**tensors: np.ndarray) -> bytes:
    return save(tensors)


HOSTILE_TENSORS = {
    "pickle": (pickle.dumps({"prompt_embeddings": [1.0] * 160}), "tensors"),
    "zip": (b"PK\x03\x04" + bytes(100), "tensors"),
    "empty header": (struct.pack("<Q", 0) + bytes(640), "tensors"),
    "huge header": (struct.pack("<Q", 2**63) + bytes(640), "tensors"),
    "no tensors": (save({}), "tensors.prompt_embeddings"),
    "another tensor beside": (
        safetensors_of(prompt_embeddings=ROWS, classifier=ROWS),
        "tensors.classifier",
    ),
    "one row less": (safetensors_of(prompt_embeddings=ROWS[:4]), "tensors.prompt_embeddings"),
    "integers": (safetensors_of(prompt_embeddings=ROWS.astype(np.int32)), "tensors.prompt_embeddings"),
    "not a number": (safetensors_of(prompt_embeddings=ROWS * np.float32("nan")), "tensors.prompt_embeddings"),
    "infinite": (safetensors_of(prompt_embeddings=ROWS * np.float32("inf")), "tensors.prompt_embeddings"),
    "infinite in bfloat16": (safetensors_of(prompt_embeddings=ROWS * 3.4e38), "tensors.prompt_embeddings"),
    "all zeros": (safetensors_of(prompt_embeddings=ROWS * 0), "tensors.prompt_embeddings"),
}


@pytest.mark.parametrize(("tensors", "field"), HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
async def test_hostile_tensors_are_refused_and_leave_nothing(client, make_adapter, redis, tensors, field):
    if tensors.startswith(b"PK"):
        tensors += bytes(640)
    with pytest.raises(AdapterInvalid) as refused:
        await client.register("bad", make_adapter().but(tensors=tensors))
    assert refused.value.field == field
    assert await redis.keys("sp:{*") == []
    await client.register("good", make_adapter())


HOSTILE_CONFIGS = {
    "another kind": ({"peft_type": "ADALORA"}, "config.peft_type"),
    "trusts remote code": ({"tokenizer_kwargs": {"trust_remote_code": True}}, "config.tokenizer_kwargs"),
    "maps classes": ({"auto_mapping": {"base_model_class": "os.system"}}, "config.auto_mapping"),
    "names a module": ({"megatron_core": "antigravity"}, "config.megatron_core"),
    "an unknown key": ({"scale": 2}, "config.scale"),
    "a path": ({"prompt_tuning_init_state_dict_path": "/etc/passwd"}, "config.prompt_tuning_init_state_dict_path"),
    "no rows": ({"num_virtual_tokens": 0}, "config.num_virtual_tokens"),
    "true is no number": ({"num_virtual_tokens": True}, "config.num_virtual_tokens"),
    "another hidden size": ({"token_dim": 64}, "config.token_dim"),
    "two submodules": ({"num_transformer_submodules": 2}, "config.num_transformer_submodules"),
}


@pytest.mark.parametrize(("changes", "field"), HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
async def test_hostile_configs_are_refused(client, make_adapter, redis, changes, field):
    adapter = make_adapter()
    with pytest.raises(AdapterInvalid) as refused:
        await client.register("bad", adapter.but(config={**adapter.config, **changes}))
    assert refused.value.field == field
    assert await redis.keys("sp:{*") == []


HOSTILE_HEADERS = {
    "path as name": ({"name": "../x"}, "name"),
    "reserved name": ({"name": "latest"}, "name"),
    "no name": ({"name": ""}, "name"),
    "no size": ({"tensors_size_bytes": 0}, "tensors_size_bytes"),
    "negative size": ({"tensors_size_bytes": -5}, "tensors_size_bytes"),
    "too large": ({"tensors_size_bytes": 2**40}, "tensors_size_bytes"),
    "less than sent": ({"tensors_size_bytes": 700}, "tensors_size_bytes"),
    "more than sent": ({"tensors_size_bytes": 5000}, "tensors"),
    "no sha256": ({"tensors_sha256": ""}, "tensors_sha256"),
    "upper-case sha256": ({"tensors_sha256": "A" * 64}, "tensors_sha256"),
    "another sha256": ({"tensors_sha256": "0" * 64}, "tensors_sha256"),
    "config is no JSON": ({"config_json": "{"}, "config_json"),
    "config is empty": ({"config_json": ""}, "config_json"),
    "config is too long": ({"config_json": " " * 2**20 + "{}"}, "config_json"),
    "key with a line break": ({"idempotency_key": "a\nb"}, "idempotency_key"),
    "long key": ({"idempotency_key": "k" * 129}, "idempotency_key"),
    "many labels": ({"labels": {str(number): "" for number in range(33)}}, "labels"),
    "long label": ({"labels": {"k": "v" * 257}}, "labels"),
    "nameless label": ({"labels": {"": "v"}}, "labels"),
}


@pytest.mark.parametrize(("header", "field"), HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
async def test_hostile_headers_are_refused(client, make_adapter, redis, header, field):
    with pytest.raises(InvalidArgument) as refused:
        await client.register("bad", make_adapter().but(header=header))
    assert refused.value.field == field
    assert await redis.keys("sp:{*") == []


async def test_the_order_of_an_upload_is_checked(client, make_adapter, redis):
    header, chunk = make_adapter().requests("bad")
    data = chunk.chunk.data
    late = pb.RegisterAdapterRequest(chunk=pb.Chunk(offset=5, data=data))
    empty = pb.RegisterAdapterRequest(chunk=pb.Chunk(offset=0, data=b""))
    too_long = pb.RegisterAdapterRequest(chunk=pb.Chunk(offset=0, data=bytes(2**20 + 1)))
    for requests, field in (
        ([], "header"),
        ([chunk], "header"),
        ([pb.RegisterAdapterRequest()], "header"),
        ([header, header], "chunk"),
        ([header, pb.RegisterAdapterRequest()], "chunk"),
        ([header, late], "chunk.offset"),
        ([header, empty], "chunk.data"),
        ([header, too_long], "chunk.data"),
        ([header, chunk, late], "chunk.offset"),
        ([header], "tensors_size_bytes"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await client.answer(client.stub.RegisterAdapter(iter(requests)))
        assert refused.value.field == field
    assert await redis.keys("sp:{*") == []


async def test_a_cancelled_upload_is_cleaned_up(client, make_adapter, redis, eventually):
    adapter = make_adapter(num_virtual_tokens=50_000)  # 6.1 MiB
    header, *chunks = adapter.requests("big")
    call = client.stub.RegisterAdapter()
    for request in (header, *chunks[:4]):
        await call.write(request)

    async def is_staged() -> bool:
        return bool(await redis.keys("*:u:*"))

    async def is_clean() -> bool:
        return await redis.keys("sp:{*") == []

    await eventually(is_staged)
    assert all([await redis.ttl(key) > 0 for key in await redis.keys("*:u:*")])
    call.cancel()
    await eventually(is_clean)
    with pytest.raises(AdapterNotFound):
        await client.get("big")
    assert await client.names() == []


class Wire:
    """A TCP link that is cut after so many bytes to the server."""

    def __init__(self, port: int, cut_after: int) -> None:
        self._port = port
        self._left = cut_after

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        down = asyncio.create_task(self._copy(up_reader, writer))
        while self._left > 0 and (data := await reader.read(min(65_536, self._left))):
            self._left -= len(data)
            up_writer.write(data)
            await up_writer.drain()
        down.cancel()
        for end in (writer, up_writer):
            end.transport.abort()
        self._server.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)


@pytest.mark.parametrize("cut_after", [10, 500, 2_000, 1_000_000, 2_500_000, 6_100_000])
async def test_a_link_cut_anywhere_leaves_nothing_visible(
    client, bare_registry, make_adapter, redis, connect, eventually, cut_after
):
    adapter = make_adapter(num_virtual_tokens=50_000)
    assert len(adapter.tensors) > 6_200_000
    async with Wire(bare_registry.port, cut_after) as port:
        cut_client = connect(port)
        with pytest.raises(grpc.RpcError):
            await cut_client.stub.RegisterAdapter(iter(adapter.requests("big")), timeout=20)
        await cut_client.channel.close()

    async def is_clean() -> bool:
        return await redis.keys("sp:{*") == []

    await eventually(is_clean)
    assert await client.names() == []
    assert (await client.register("big", adapter)).version == 1


async def test_a_large_upload_is_refused_at_its_first_fault_with_the_reason(client, make_adapter, redis):
    adapter = make_adapter(num_virtual_tokens=100_000)  # 12 MiB
    torn = b"\xff" * 8 + adapter.tensors[8:]
    for bad, field in (
        (adapter.but(config={**adapter.config, "token_dim": 31}), "config.token_dim"),
        (adapter.but(tensors=torn), "tensors"),
    ):
        for _ in range(3):
            with pytest.raises(AdapterInvalid) as refused:
                await client.register("bad", bad)
            assert refused.value.field == field
    assert await redis.keys("sp:{*") == []


async def test_an_upload_that_claims_anothers_sha256_cannot_harm_it(client, make_adapter):
    good = make_adapter(1)
    made = await client.register("good", good)
    with pytest.raises(AdapterInvalid) as refused:
        await client.register("bad", make_adapter(2).but(header={"tensors_sha256": good.sha256}))
    assert refused.value.field == "tensors_sha256"
    assert await client.read(made.digest) == good.tensors


async def test_uploads_are_bounded_in_number_and_time(settings, make_adapter, connect, forever):
    changes = {"max_uploads": 1, "upload_timeout_s": 0.5}
    async with RegistryServer(settings.model_copy(update=changes)) as server:
        client = connect(server.port)
        header, _ = make_adapter().requests("slow")
        await client.stub.PutBaseModel(
            pb.PutBaseModelRequest(base_model=pb.BaseModel(id="org/Tiny", hidden_size=32))
        )
        slow = client.stub.RegisterAdapter()
        await slow.write(header)
        with pytest.raises(Overloaded):  # as soon as the first one has begun
            await forever(lambda: client.register("fast", make_adapter()))
        with pytest.raises(DeadlineExceeded):
            await client.answer(slow)
        assert (await client.register("fast", make_adapter())).name == "fast"
        await client.channel.close()


async def test_what_is_held_to_be_checked_is_bounded_over_all_uploads(
    settings, make_adapter, connect, forever, monkeypatch
):
    tensors = save(
        {
            "prompt_embeddings": ROWS,
            "prefix_task_cols": np.ones((3, 5, 1), np.float32),
            "prefix_task_rows": np.ones((3, 1, 32), np.float32),
        }
    )
    sizes = {"num_virtual_tokens": 5, "token_dim": 32, "num_tasks": 3, "num_ranks": 1}
    tasks = make_adapter().but(config={"peft_type": "MULTITASK_PROMPT_TUNING", **sizes}, tensors=tensors)
    monkeypatch.setattr(uploads, "_MAX_HELD_BYTES", 2 * len(tensors) - 1)
    async with RegistryServer(settings.model_copy(update={"upload_timeout_s": 0.5})) as server:
        client = connect(server.port)
        header, _ = tasks.requests("slow")
        await client.stub.PutBaseModel(
            pb.PutBaseModelRequest(base_model=pb.BaseModel(id="org/Tiny", hidden_size=32))
        )
        slow = client.stub.RegisterAdapter()
        await slow.write(header)
        with pytest.raises(Overloaded, match="bytes of adapters of several tasks are held to be checked"):
            await forever(lambda: client.register("fast", tasks))
        assert (await client.register("plain", make_adapter())).name == "plain"
        with pytest.raises(DeadlineExceeded):
            await client.answer(slow)
        assert (await client.register("fast", tasks)).num_tasks == 3
        await client.channel.close()


def resident_bytes() -> int:
    """Memory of this process that is not shared with the page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


async def test_200_megabytes_pass_through_a_few(client, make_adapter):
    # What the first upload alone allocates, and what other tests left to be collected, is not counted.
    first = await client.register("first", make_adapter(num_virtual_tokens=50_000))
    await client.read(first.digest)
    gc.collect()
    # Client, registry and this test share a process: what is made here is made in pieces, and never kept.
    num_rows, row = 1_600_000, np.arange(1, 33, dtype=np.float32).tobytes()
    body = row * 8192
    size = num_rows * len(row)
    header = (
        b'{"prompt_embeddings":{"dtype":"F32","shape":[%d,32],"data_offsets":[0,%d]}}' % (num_rows, size)
    ).ljust(128)
    start = struct.pack("<Q", len(header)) + header
    pieces = [start, *[body] * (size // len(body)), body[: size % len(body)]]
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    total = sum(len(piece) for piece in pieces)
    assert total > 200e6

    def requests():
        config = json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": num_rows, "token_dim": 32})
        yield pb.RegisterAdapterRequest(
            header=pb.RegisterAdapterHeader(
                name="huge", config_json=config, tensors_size_bytes=total, tensors_sha256=sha256.hexdigest()
            )
        )
        offset = 0
        for piece in pieces:
            yield pb.RegisterAdapterRequest(chunk=pb.Chunk(offset=offset, data=piece))
            offset += len(piece)

    before, largest = resident_bytes(), 0

    async def watched():
        nonlocal largest
        for request in requests():
            largest = max(largest, resident_bytes())
            yield request

    made = (await client.stub.RegisterAdapter(watched())).adapter
    back = hashlib.sha256()
    async for response in client.stub.ReadTensors([pb.ReadTensorsRequest(digest=made.digest)]):
        back.update(response.chunk.data)
        largest = max(largest, resident_bytes())
    assert back.hexdigest() == sha256.hexdigest()
    assert largest - before < 40e6
