"""Adapters come from the registry whole and verified, or not at all."""

# gRPC names the methods.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.numpy import load_file, save
from softprompt_api.errors import (
    AdapterInvalid,
    AdapterNotFound,
    DataCorrupted,
    InvalidArgument,
    Overloaded,
    SoftpromptError,
    Unavailable,
)
from softprompt_api.formats import Lora, LoraModule, Rows, adapter_digest, parse_config, read_folder
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import SMALL_FILE_BYTES, open_channel
from softprompt_api.rpc.context import enter_request
from softprompt_api.rpc.server import ServiceServer
from softprompt_inference.adapters import reading as reading_module
from softprompt_inference.adapters import source as source_module
from softprompt_inference.adapters import transfer as transfer_module
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import NoWay
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.adapters.transfer import Transfer
from softprompt_inference.engine import steps as steps_module
from softprompt_inference.engine.codec import HEADER, decode, encode
from softprompt_inference.engine.messages import LoadLora
from softprompt_inference.engine.steps import Steps
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN_SIZE = 16
BASE_MODEL = pb.BaseModel(
    id="tiny",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN_SIZE,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    tokenizer_sha256="a" * 64,
    max_virtual_tokens=64,
    dtype="float32",
)
CHUNK_BYTES = 100

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class FakeRegistry(registry_pb2_grpc.RegistryServiceServicer):
    """A registry that keeps versions in memory and can be made to misbehave."""

    versions: dict[str, pb.AdapterVersion] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # each read ends with UNAVAILABLE after so many chunks
    offsets: list[int] = field(default_factory=list)  # asked for
    bases: list[str] = field(default_factory=list)  # asked for
    shift: int = 0  # added to the offset of every chunk sent
    num_streams: int = 0  # opened to read tensors
    files_per_stream: int | None = None  # then it ends
    ended: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))  # once for each that has ended
    contexts: list[dict[str, str]] = field(default_factory=list)  # of what was asked for
    lookup_error: SoftpromptError | None = None  # where a name and its file are asked for together

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        if request.adapter not in self.versions:
            raise AdapterNotFound(f"there is no adapter {request.adapter}")
        return pb.GetAdapterResponse(adapter=self.versions[request.adapter])

    async def ReadTensors(
        self, request_iterator: AsyncIterator[pb.ReadTensorsRequest], context: Context
    ) -> AsyncIterator[pb.ReadTensorsResponse]:
        self.num_streams += 1
        num_files = 0
        async for request in request_iterator:
            self.contexts.append(dict(request.context))
            async for response in self._read(request):
                yield response
            num_files += 1
            if num_files == self.files_per_stream:
                break
        self.ended.release()

    async def _read(self, request: pb.ReadTensorsRequest) -> AsyncIterator[pb.ReadTensorsResponse]:
        if request.adapter:
            yield self._look_up(request.adapter)
            return
        self.offsets.append(request.offset)
        self.bases.append(request.base_model_id)
        if request.digest not in self.versions:
            raise AdapterNotFound(f"no adapter has the digest {request.digest}")
        data = self.files[request.digest]
        num_chunks = self.cuts.pop(0) if self.cuts else None
        for number, start in enumerate(range(request.offset, len(data), CHUNK_BYTES)):
            if number == num_chunks:
                raise Unavailable("the store is away")
            chunk = pb.Chunk(offset=start + self.shift, data=data[start : start + CHUNK_BYTES])
            adapter = self.versions[request.digest] if number == 0 else None
            yield pb.ReadTensorsResponse(chunk=chunk, size_bytes=len(data), adapter=adapter)

    def _look_up(self, name: str) -> pb.ReadTensorsResponse:
        if self.lookup_error is not None:
            raise self.lookup_error
        if name not in self.versions:
            raise AdapterNotFound(f"there is no adapter {name}")
        version = self.versions[name]
        data = self.files[version.digest]
        chunk = pb.Chunk(data=data if len(data) <= SMALL_FILE_BYTES else b"")
        return pb.ReadTensorsResponse(chunk=chunk, size_bytes=len(data), adapter=version)

    def add(self, name: str, rows: np.ndarray[Any, Any]) -> pb.AdapterVersion:
        """Register rows as PEFT would save them."""
        num_virtual_tokens, hidden_size = rows.shape
        config = json.dumps(
            PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, token_dim=hidden_size
            ).to_dict()
        )
        data = save({"prompt_embeddings": rows})
        digest = adapter_digest(parse_config(config), sha256(data).hexdigest())
        version = pb.AdapterVersion(
            name=name,
            version=1,
            digest=digest,
            num_virtual_tokens=num_virtual_tokens,
            hidden_size=hidden_size,
            size_bytes=len(data),
            tensors_sha256=sha256(data).hexdigest(),
            config_json=config,
            base_model=BASE_MODEL,
        )
        self.versions[name] = self.versions[digest] = version
        self.files[digest] = data
        return version

    def add_folder(self, name: str, folder: Path) -> pb.AdapterVersion:
        """Register what PEFT wrote."""
        files = read_folder(folder)
        spec, data = parse_config(files.config_json), files.tensors_path.read_bytes()
        digest = adapter_digest(spec, sha256(data).hexdigest())
        version = pb.AdapterVersion(
            name=name,
            version=1,
            digest=digest,
            num_virtual_tokens=spec.num_virtual_tokens,
            num_tasks=spec.num_tasks,
            size_bytes=len(data),
            tensors_sha256=sha256(data).hexdigest(),
            config_json=files.config_json,
            base_model=BASE_MODEL,
        )
        self.versions[name] = self.versions[digest] = version
        self.files[digest] = data
        return version


def save_adapter(folder: Path, config: PeftConfig) -> Path:
    """A folder of an adapter for a tiny model of the shape of BASE_MODEL."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN_SIZE,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=9,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(8, HIDDEN_SIZE)).astype(np.float32)


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
async def stub(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[registry_pb2_grpc.RegistryServiceAsyncStub]:
    monkeypatch.setattr(source_module, "RESUME_DELAYS_S", (0.0, 0.0))
    server = ServiceServer("127.0.0.1:0", [pb.DESCRIPTOR.services_by_name["RegistryService"]])
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.server)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield registry_pb2_grpc.RegistryServiceStub(channel)
    await server.stop(0)


@pytest.fixture
def source(stub: registry_pb2_grpc.RegistryServiceAsyncStub) -> AdapterSource:
    return AdapterSource(stub, BASE_MODEL)


async def test_a_name_is_resolved_to_its_version(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    assert await source.resolve("tweets") == version


async def test_an_unknown_name_is_not_found(source: AdapterSource) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        await source.resolve("nobody")


def rows_of(adapter: Adapter) -> Rows:
    assert isinstance(adapter.content, Rows)
    return adapter.content


async def test_rows_arrive_as_they_were_registered(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    adapter = await source.fetch(version.digest)
    assert (adapter.digest, rows_of(adapter).dtype, adapter.num_virtual_tokens) == (version.digest, "float32", 8)
    np.testing.assert_array_equal(np.frombuffer(rows_of(adapter).data, np.float32).reshape(8, HIDDEN_SIZE), rows)


async def test_a_small_file_comes_with_the_version_that_its_name_stands_for(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    assert await source.resolve_to_fetch("tweets") == version
    assert rows_of(await source.fetch(version.digest)).data == rows.tobytes()
    assert registry.offsets == [], "it was there"
    assert rows_of(await source.fetch(version.digest)).data == rows.tobytes()
    assert (registry.offsets, registry.num_streams) == ([0], 1), "and is not kept"


async def test_what_came_with_a_version_is_verified_as_if_it_had_been_fetched(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    whole = registry.files[version.digest]
    registry.files[version.digest] = whole[:-1] + b"?"
    await source.resolve_to_fetch("tweets")
    registry.files[version.digest] = whole
    with pytest.raises(DataCorrupted):
        await source.fetch(version.digest)
    assert rows_of(await source.fetch(version.digest)).data == rows.tobytes()


async def test_a_large_file_does_not_come_with_its_version(
    registry: FakeRegistry, stub: registry_pb2_grpc.RegistryServiceAsyncStub
) -> None:
    rows = np.ones((SMALL_FILE_BYTES // HIDDEN_SIZE // 4, HIDDEN_SIZE), np.float32)
    version = registry.add("long", rows)
    base_model = pb.BaseModel()
    base_model.CopyFrom(BASE_MODEL)
    base_model.max_virtual_tokens = len(rows)
    source = AdapterSource(stub, base_model)
    assert await source.resolve_to_fetch("long") == version
    assert rows_of(await source.fetch(version.digest)).data == rows.tobytes()
    assert registry.offsets == [0]


async def test_a_version_for_another_base_model_is_fetched_as_its_digest_is(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    version.base_model.id = "other"
    await source.resolve_to_fetch("tweets")
    await source.fetch(version.digest)
    assert (registry.offsets, registry.bases) == ([0], ["tiny"])


async def test_of_files_that_nobody_fetches_few_are_kept(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    versions = [registry.add(f"tweets-{number}", rows + number) for number in range(6)]
    for version in versions:
        await source.resolve_to_fetch(version.name)
    for version in versions:
        await source.fetch(version.digest)
    assert len(registry.offsets) == 2


@pytest.mark.parametrize(
    "error",
    [Unavailable("the store is away"), DataCorrupted("a chunk is missing"), InvalidArgument("?")],
)
async def test_where_the_file_cannot_come_along_the_name_is_resolved_alone(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any], error: SoftpromptError
) -> None:
    version = registry.add("tweets", rows)
    registry.lookup_error = error
    assert await source.resolve_to_fetch("tweets") == version


async def test_of_a_digest_the_version_comes_alone(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    assert await source.resolve_to_fetch(version.digest) == version
    assert registry.num_streams == 0


async def test_a_name_that_is_not_there_has_no_file_to_fetch(source: AdapterSource) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        await source.resolve_to_fetch("nobody")


@pytest.mark.parametrize("damage", ["no version", "another size"])
async def test_an_answer_that_cannot_be_is_not_taken(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any], damage: str
) -> None:
    version = registry.add("tweets", rows)
    whole = pb.AdapterVersion()
    whole.CopyFrom(version)
    if damage == "no version":
        registry.versions["tweets"] = pb.AdapterVersion()
        registry.files[""] = b"?"
    else:
        registry.files[version.digest] += b"?"
    with pytest.raises(DataCorrupted, match="did not say which version a name stands for, or sent another file"):
        await source._reader.look_up("tweets")


async def test_an_interrupted_transfer_goes_on_where_it_stopped(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    registry.cuts = [2, 1, 1]
    adapter = await source.fetch(version.digest)
    assert rows_of(adapter).data == rows.tobytes()
    assert registry.offsets == [0, 200, 300, 400]
    # Another version with this content may be for another model.
    assert set(registry.bases) == {"tiny"}


async def test_one_file_after_the_other_comes_over_one_stream_each_for_its_own_request(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    async def fetch_for(request_id: str, digest: str) -> Adapter:
        enter_request(request_id)
        return await source.fetch(digest)

    versions = [registry.add(f"a{number}", rows + number) for number in range(3)]
    for number, version in enumerate(versions):
        adapter = await asyncio.create_task(fetch_for(f"request-{number}", version.digest))
        assert rows_of(adapter).data == (rows + number).tobytes()
    assert registry.num_streams == 1
    assert registry.contexts == [{"x-request-id": f"request-{number}"} for number in range(3)]


async def test_files_that_are_fetched_at_once_come_over_streams_of_their_own_of_which_few_are_kept(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    versions = [registry.add(f"a{number}", rows + number) for number in range(6)]
    for num_streams in (6, 8):
        adapters = await asyncio.gather(*(source.fetch(version.digest) for version in versions))
        assert [adapter.digest for adapter in adapters] == [version.digest for version in versions]
        assert registry.num_streams == num_streams


async def test_a_stream_that_was_left_in_the_middle_of_a_file_is_not_used_again(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    fine, broken = registry.add("fine", rows), registry.add("broken", rows + 1)
    await source.fetch(fine.digest)
    registry.shift = 1
    with pytest.raises(DataCorrupted):
        await source.fetch(broken.digest)
    registry.shift = 0
    assert rows_of(await source.fetch(fine.digest)).data == rows.tobytes()
    assert registry.num_streams == 2


async def test_a_stream_that_is_over_or_old_is_not_used_again(
    registry: FakeRegistry,
    source: AdapterSource,
    rows: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = registry.add("tweets", rows)
    registry.files_per_stream = 1
    with structlog.testing.capture_logs() as logged:
        for _ in range(2):
            await source.fetch(version.digest)
            await registry.ended.acquire()
            [kept] = source._reader._kept
            await kept.call.code()
    assert registry.num_streams == 2
    assert "adapter transfer interrupted" not in [entry["event"] for entry in logged]
    registry.files_per_stream = None
    monkeypatch.setattr(reading_module, "_MAX_AGE_S", 0.0)
    for _ in range(2):
        await source.fetch(version.digest)
    assert registry.num_streams == 4


async def test_an_unknown_digest_is_not_found(source: AdapterSource) -> None:
    with pytest.raises(AdapterNotFound):
        await source.fetch("sha256:" + "0" * 64)


async def test_a_transfer_that_never_moves_on_ends(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    registry.cuts = [0] * 100
    with pytest.raises(Unavailable, match="cannot be reached"):
        await source.fetch(version.digest)


def _flip_a_byte(registry: FakeRegistry, digest: str) -> None:
    data = bytearray(registry.files[digest])
    data[-1] ^= 1
    registry.files[digest] = bytes(data)


def _break_the_header(registry: FakeRegistry, digest: str) -> None:
    data = bytearray(registry.files[digest])
    data[0] ^= 255
    registry.files[digest] = bytes(data)


def _cut_the_file(registry: FakeRegistry, digest: str) -> None:
    registry.files[digest] = registry.files[digest][:-1]


def _make_the_file_longer(registry: FakeRegistry, digest: str) -> None:
    registry.files[digest] += b"x"


def _send_other_offsets(registry: FakeRegistry, digest: str) -> None:
    registry.shift = 1


def _claim_a_huge_size(registry: FakeRegistry, digest: str) -> None:
    registry.versions[digest].size_bytes = 2**40


def _answer_with_another_version(registry: FakeRegistry, digest: str) -> None:
    registry.versions[digest].digest = "sha256:" + "0" * 64


def _change_the_config(registry: FakeRegistry, digest: str) -> None:
    data = registry.files[digest]
    other = registry.add("other", np.ones((8, HIDDEN_SIZE), np.float32))
    version = registry.versions[digest]
    version.tensors_sha256 = other.tensors_sha256
    version.size_bytes = other.size_bytes
    registry.files[digest] = registry.files[other.digest]
    assert data != registry.files[digest]


@pytest.mark.parametrize(
    "corrupt",
    [
        _flip_a_byte,
        _break_the_header,
        _cut_the_file,
        _make_the_file_longer,
        _send_other_offsets,
        _claim_a_huge_size,
        _answer_with_another_version,
        _change_the_config,
    ],
)
async def test_what_is_not_what_was_registered_is_never_taken(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any], corrupt: Any
) -> None:
    version = registry.add("tweets", rows)
    digest = version.digest
    corrupt(registry, digest)
    with pytest.raises(DataCorrupted):
        await source.fetch(digest)


async def test_what_was_registered_but_cannot_be_served_is_invalid_and_not_corrupted(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    rows[3, 3] = np.nan
    version = registry.add("broken", rows)
    with pytest.raises(AdapterInvalid, match="has nan at row 3"):
        await source.fetch(version.digest)


async def test_a_file_that_is_as_it_should_be_is_hashed_once(
    registry: FakeRegistry,
    source: AdapterSource,
    rows: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = registry.add("tweets", rows)
    num_bytes: list[int] = []

    def count(data: bytes = b"") -> Any:
        num_bytes.append(len(data))
        return sha256(data)

    monkeypatch.setattr("hashlib.sha256", count)
    assert (await source.fetch(version.digest)).digest == version.digest
    assert version.size_bytes not in num_bytes  # the verifier's is fed
    assert 0 in num_bytes


async def test_a_fetch_that_is_cancelled_ends_only_when_its_thread_has_let_go_of_the_file(
    registry: FakeRegistry,
    source: AdapterSource,
    rows: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def read(*_: object) -> Adapter:
        has_begun.set()
        may_end.wait()
        raise AdapterInvalid("nobody is told")

    version = registry.add("tweets", rows)
    monkeypatch.setattr(Transfer, "finish", read)
    monkeypatch.setattr(transfer_module, "SMALL_FILE_BYTES", 0)  # it goes to a thread, as a large one does
    fetching = asyncio.create_task(source.fetch(version.digest))
    await asyncio.to_thread(has_begun.wait)
    fetching.cancel()
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        assert not fetching.done()
    finally:
        may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await fetching


async def test_an_adapter_of_another_hidden_size_is_refused_with_both_sizes(
    registry: FakeRegistry, source: AdapterSource
) -> None:
    version = registry.add("wide", np.ones((4, 32), np.float32))
    with pytest.raises(AdapterInvalid, match=r"32.*16"):
        await source.fetch(version.digest)


async def test_an_adapter_made_for_another_model_is_refused_with_the_difference(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    version.base_model.num_layers = 30
    with pytest.raises(AdapterInvalid, match="num_layers 30, and this model has 2") as caught:
        await source.fetch(version.digest)
    assert caught.value.field == "adapter"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "GPT2LMHeadModel"),
        ("num_layers", 3),
        ("num_kv_heads", 4),
        ("head_dim", 8),
        ("vocab_size", 101),
    ],
)
async def test_every_fact_of_the_models_shape_is_compared_at_load(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any], field: str, value: Any
) -> None:
    version = registry.add("tweets", rows)
    setattr(version.base_model, field, value)
    with pytest.raises(AdapterInvalid, match=f"a model with {field} {value}"):
        await source.fetch(version.digest)


async def test_another_tokenizer_than_at_the_registration_is_told_and_served(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any]
) -> None:
    version = registry.add("tweets", rows)
    with structlog.testing.capture_logs() as logged:
        await source.fetch(version.digest)
    assert not [entry for entry in logged if entry["log_level"] == "warning"]
    version.base_model.tokenizer_sha256 = "b" * 64
    with structlog.testing.capture_logs() as logged:
        assert rows_of(await source.fetch(version.digest)).data == rows.tobytes()
    [warning] = [entry for entry in logged if entry["log_level"] == "warning"]
    assert (warning["adapter"], warning["digest"]) == ("tweets", version.digest)
    assert "another tokenizer" in warning["event"]


async def test_more_virtual_tokens_than_allowed_are_refused(registry: FakeRegistry, source: AdapterSource) -> None:
    version = registry.add("long", np.ones((65, HIDDEN_SIZE), np.float32))
    with pytest.raises(AdapterInvalid, match="at most 64"):
        await source.fetch(version.digest)


async def test_a_registry_that_is_away_is_unavailable_and_not_named() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        source = AdapterSource(registry_pb2_grpc.RegistryServiceStub(channel), BASE_MODEL)
        with pytest.raises(Unavailable) as caught:
            await source.resolve("tweets")
    error: SoftpromptError = caught.value
    assert "127.0.0.1" not in error.message


@pytest.fixture
def two_tasks(registry: FakeRegistry, tmp_path: Path) -> pb.AdapterVersion:
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    return registry.add_folder("many", save_adapter(tmp_path, config))


@pytest.mark.parametrize("task", [0, 1])
async def test_a_task_is_fetched_as_a_prompt_of_its_own(
    source: AdapterSource, two_tasks: pb.AdapterVersion, tmp_path: Path, task: int
) -> None:
    adapter = await source.fetch(f"{two_tasks.digest}:{task}")
    assert (adapter.digest, rows_of(adapter).dtype) == (f"{two_tasks.digest}:{task}", "float32")
    whole = load_file(tmp_path / "adapter_model.safetensors")
    expected = whole["prompt_embeddings"] * (whole["prefix_task_cols"][task] @ whole["prefix_task_rows"][task])
    rows = np.frombuffer(rows_of(adapter).data, np.float32).reshape(3, HIDDEN_SIZE)
    np.testing.assert_allclose(rows, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("task", "message"), [("", "has the tasks 0 to 1; name one"), (":2", "no task 2"), (":99", "no task 99")]
)
async def test_a_digest_without_a_task_of_its_own_is_refused(
    source: AdapterSource, two_tasks: pb.AdapterVersion, task: str, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        await source.fetch(f"{two_tasks.digest}{task}")


@pytest.fixture
def prefix(registry: FakeRegistry, tmp_path: Path) -> pb.AdapterVersion:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return registry.add_folder("prefix", save_adapter(tmp_path, config))


async def test_keys_and_values_are_fetched_for_the_layers_and_heads_of_the_model(
    source: AdapterSource, prefix: pb.AdapterVersion, tmp_path: Path
) -> None:
    adapter = await source.fetch(prefix.digest)
    assert (adapter.num_virtual_tokens, rows_of(adapter).row_size) == (3, 2 * 2 * 2 * 4)
    assert adapter.are_key_values
    [saved] = load_file(tmp_path / "adapter_model.safetensors").values()
    assert rows_of(adapter).data == saved.tobytes()


@pytest.fixture
def lora(registry: FakeRegistry, tmp_path: Path) -> pb.AdapterVersion:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        rank_pattern={"v_proj": 2},
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )
    return registry.add_folder("lora", save_adapter(tmp_path, config))


async def test_a_lora_is_fetched_with_rank_and_scale_of_each_module(
    source: AdapterSource, lora: pb.AdapterVersion, tmp_path: Path
) -> None:
    adapter = await source.fetch(lora.digest)
    assert (adapter.is_lora, adapter.num_virtual_tokens, adapter.spelling) == (True, 0, "lora@1")
    command = adapter.load_command()
    assert isinstance(command, LoadLora)
    assert (command.digest, command.dtype) == (lora.digest, "float32")
    whole = load_file(tmp_path / "adapter_model.safetensors")
    assert len(command.modules) * 2 == len(whole)
    for module in command.modules:
        rank = 2 if module.name.endswith("v_proj") else 4
        assert (module.rank, module.scale) == (rank, 6 / rank)
        assert module.a == whole[f"base_model.model.{module.name}.lora_A.weight"].tobytes()
        assert module.b == whole[f"base_model.model.{module.name}.lora_B.weight"].tobytes()
    assert adapter.size_bytes == sum(tensor.nbytes for tensor in whole.values())


async def test_a_lora_above_the_rank_or_the_size_that_is_served_is_refused(
    registry: FakeRegistry, stub: registry_pb2_grpc.RegistryServiceAsyncStub, lora: pb.AdapterVersion
) -> None:
    narrow = pb.BaseModel()
    narrow.CopyFrom(BASE_MODEL)
    narrow.max_lora_rank = 3
    with pytest.raises(AdapterInvalid, match="rank 4; at most 3"):
        await AdapterSource(stub, narrow).fetch(lora.digest)
    registry.offsets.clear()
    with pytest.raises(AdapterInvalid, match=r"at most 1024 are served \(max_lora_bytes\)"):
        await AdapterSource(stub, BASE_MODEL, max_lora_bytes=1024).fetch(lora.digest)
    assert registry.offsets == [0]  # the transfer ended with its first piece, and was not tried again


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files count as large, and two pieces of the registry's are a step's share."""
    monkeypatch.setattr(transfer_module, "SMALL_FILE_BYTES", 0)
    monkeypatch.setattr(transfer_module, "_MAX_BUFFER_BYTES", 0)
    monkeypatch.setattr(transfer_module, "_STEP_BYTES", 2 * CHUNK_BYTES)
    monkeypatch.setattr(transfer_module, "_MAX_STEPS", 1_000)


@pytest.mark.usefixtures("large")
async def test_a_large_file_comes_in_beside_steps_that_it_would_hold_up(
    source: AdapterSource, lora: pb.AdapterVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str | int] = []
    keep = Transfer.keep

    class Watched(Steps):
        async def next(self) -> None:
            done.append("step")

    def watch(transfer: Transfer) -> None:
        num_kept = transfer.num_kept
        keep(transfer)
        done.append(transfer.num_kept - num_kept)

    monkeypatch.setattr(Transfer, "keep", watch)
    adapter = await source.fetch(lora.digest, steps=Watched(lambda: True))
    # The first piece, which has the header, by itself; then two at a time; what is left with the last look at all.
    num_whole, rest = divmod(lora.size_bytes - CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert num_whole > 5
    assert done == ["step", CHUNK_BYTES, *["step", 2 * CHUNK_BYTES] * num_whole, "step", rest]
    assert adapter.load_command() == (await source.fetch(lora.digest)).load_command()


async def test_a_small_file_waits_for_no_step(
    registry: FakeRegistry, source: AdapterSource, rows: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "_MAX_WAIT_S", 60.0)
    version = registry.add("tweets", rows)
    steps = Steps(lambda: True)
    async with asyncio.timeout(10):
        assert (await source.fetch(version.digest, steps=steps)).digest == version.digest


async def test_a_large_file_is_read_on_only_once_there_is_way_for_it(
    source: AdapterSource, lora: pb.AdapterVersion, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def make_way() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise NoWay

    await source.fetch(lora.digest, make_way)
    assert asked == 0
    monkeypatch.setattr(transfer_module, "_LARGE_FILE_BYTES", 0)
    with pytest.raises(NoWay):
        await source.fetch(lora.digest, make_way)
    registry.cuts = [2]
    assert (await source.fetch(lora.digest, make_way)).digest == lora.digest
    assert asked == 2  # not again where it goes on


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["lora", "prefix"])
async def test_what_a_large_adapter_holds_is_a_part_of_a_file_for_the_engine(
    source: AdapterSource, kind: str, request: pytest.FixtureRequest
) -> None:
    adapter = await source.fetch(request.getfixturevalue(kind).digest)
    command = adapter.load_command()
    assert command.file is not None
    assert decode(encode(command)[HEADER.size :], command.file.read) == command


@pytest.mark.usefixtures("large")
async def test_a_large_file_for_which_there_is_no_room_is_refused_for_now(
    source: AdapterSource, lora: pb.AdapterVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(Overloaded, match=r"no room in memory for the adapter now \(No space left on device\)"):
        await source.fetch(lora.digest)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("is_corrupt", [False, True])
async def test_a_large_file_that_is_refused_in_its_middle_is_told_apart_from_one_that_is_damaged(
    registry: FakeRegistry,
    source: AdapterSource,
    rows: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    is_corrupt: bool,
) -> None:
    monkeypatch.setattr(transfer_module, "_BATCH_BYTES", CHUNK_BYTES)
    rows[1, 1] = np.nan
    version = registry.add("broken", rows)
    if is_corrupt:
        registry.files[version.digest] = registry.files[version.digest][:-1] + b"\x7f"
    with pytest.raises(
        DataCorrupted if is_corrupt else AdapterInvalid, match="not those" if is_corrupt else "nan"
    ):
        await source.fetch(version.digest)


def test_matrices_of_several_dtypes_go_to_the_engine_as_float32() -> None:
    values = np.array([1.5, -2.0], np.float32)
    stored = {"bfloat16": (values.view(np.uint32) >> 16).astype(np.uint16), "float16": values.astype(np.float16)}
    modules = tuple(
        LoraModule(
            name=dtype,
            rank=1,
            scale=1.0,
            in_features=2,
            out_features=2,
            a=data.tobytes(),
            b=data.tobytes(),
            dtype=dtype,
        )
        for dtype, data in stored.items()
    )
    command = Adapter(digest="sha256:x", content=Lora(modules=modules)).load_command()
    assert isinstance(command, LoadLora)
    assert command.dtype == "float32"
    assert all(module.a == module.b == values.tobytes() for module in command.modules)
