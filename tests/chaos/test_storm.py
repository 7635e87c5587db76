"""In a storm of registrations, moved aliases, evictions and cancellations every answer is its own adapter's."""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from softprompt_api.errors import AdapterInUse, AdapterNotFound
from softprompt_api.inference.v1 import inference_pb2
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.status import from_rpc_error

pytestmark = pytest.mark.timeout(3600)

_NAMES = ("red", "green", "blue", "grey")
_NUM_CONTENTS = 8
_NUM_PROMPTS = 4
_PREFIX_TOKENS = 600
_PAUSE_S = 0.03
_MAX_LONGER = 5
_BASE = "tiny"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request's prompt, and how many tokens it wants."""

    prompt_ids: list[int]
    max_tokens: int


def make_prompts(rng: random.Random) -> list[Asked]:
    """Prompts that share their first tokens, which fill many pages."""
    prefix = [rng.randrange(300, 5000) for _ in range(_PREFIX_TOKENS)]
    return [
        Asked(
            prompt_ids=prefix + [rng.randrange(300, 5000) for _ in range(rng.randint(1, 40))],
            max_tokens=rng.randint(4, 24),
        )
        for _ in range(_NUM_PROMPTS)
    ]


def solo_outputs(model: Path, contents: list[Any], prompts: list[Asked], folder: Path) -> list[list[list[int]]]:
    """The ids of each content, the base model last, and prompt: each alone, with nothing shared or cached."""
    from softprompt import LLM, PromptAdapterRequest, SamplingParams

    llm = LLM(
        model=str(model),
        dtype="float32",
        device="cpu",
        max_model_len=1024,
        enable_prefix_caching=False,
        kv_cache_gb=0.05,
    )
    adapters: list[PromptAdapterRequest | None] = []
    for number, content in enumerate(contents):
        path = folder / str(number)
        path.mkdir()
        (path / "adapter_config.json").write_text(content.config_json)
        (path / "adapter_model.safetensors").write_bytes(content.tensors)
        adapters.append(PromptAdapterRequest(f"content{number}", number + 1, str(path)))
    outputs = []
    for adapter in (*adapters, None):
        outputs.append([])
        for asked in prompts:
            [output] = llm.generate(
                [{"prompt_token_ids": asked.prompt_ids}],
                SamplingParams(temperature=0, max_tokens=asked.max_tokens, ignore_eos=True),
                prompt_adapter_request=adapter,
            )
            outputs[-1].append(list(output.outputs[0].token_ids))
    return outputs


@dataclass(kw_only=True)
class Storm:
    """What is true by now, and what was seen.

    Attributes:
        digests: of the contents, in their order.
        versions: `name@number` to the digest that its registration was told.
        seen: `name@number` to the digest that an answer was made with.
    """

    digests: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    num_asked: int = 0
    num_whole: int = 0
    num_cancelled: int = 0
    num_changes: int = 0
    num_evicted: int = 0
    wrong: list[str] = field(default_factory=list)


async def change(
    storm: Storm, registry: Any, inference: Any, contents: list[Any], rng: random.Random, stop: asyncio.Event
) -> None:
    """Register, move an alias, or evict, every few milliseconds."""
    while not stop.is_set():
        kind, name = rng.choice(("register", "alias", "rollback", "evict", "evict")), rng.choice(_NAMES)
        numbers = [
            int(spelling.partition("@")[2]) for spelling in storm.versions if spelling.startswith(f"{name}@")
        ]
        if kind == "register":
            made = await registry.register(name, rng.choice(contents))
            storm.versions[f"{name}@{made.version}"] = made.digest
        elif kind == "evict":
            held = await inference.ListResident(inference_pb2.ListResidentRequest())
            idle = [one.digest for one in held.adapters if not one.in_use]
            digest = rng.choice([*idle, rng.choice(storm.digests)])
            with contextlib.suppress(AdapterInUse, AdapterNotFound):
                try:
                    await inference.Evict(inference_pb2.EvictRequest(adapter=digest))
                    storm.num_evicted += 1
                except grpc.aio.AioRpcError as error:
                    raise from_rpc_error(error) from None
        else:
            alias = "prod" if kind == "alias" else "latest"
            await registry.set_alias(name, alias, rng.choice(numbers))
        storm.num_changes += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PAUSE_S)


class Users:
    """Clients that ask, check what they are told, and sometimes leave early."""

    def __init__(
        self, storm: Storm, http: httpx.AsyncClient, prompts: list[Asked], solo: list[list[list[int]]]
    ) -> None:
        self._storm = storm
        self._http = http
        self._prompts = prompts
        self._solo = solo

    async def run(self, rng: random.Random, num_requests: int) -> None:
        """Ask until all have asked so often together, and longer where nothing was evicted yet, up to a limit."""
        storm = self._storm
        while not storm.wrong and storm.num_asked < num_requests * (1 if storm.num_evicted else _MAX_LONGER):
            storm.num_asked += 1
            number = rng.randrange(len(self._prompts))
            model = self._model(rng)
            if rng.random() < 0.3:
                await self._leave_early(model, number, rng)
            else:
                await self._ask(model, number)

    def _model(self, rng: random.Random) -> str:
        storm = self._storm
        kind = rng.randrange(10)
        if kind == 0:
            return _BASE
        if kind < 3:
            return rng.choice(storm.digests)
        if kind < 5:
            return rng.choice(list(storm.versions))
        return rng.choice(_NAMES) + ("@prod" if kind < 7 else "")

    def _body(self, model: str, number: int) -> dict[str, Any]:
        asked = self._prompts[number]
        return {
            "model": model,
            "prompt": asked.prompt_ids,
            "max_tokens": asked.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    async def _ask(self, model: str, number: int) -> None:
        response = await self._http.post("/v1/completions", json=self._body(model, number))
        if response.status_code != 200:
            self._storm.wrong.append(f"{model}: {response.status_code} {response.text[:200]}")
            return
        self._check(model, number, response.headers, response.json()["choices"][0]["token_ids"])
        self._storm.num_whole += 1

    async def _leave_early(self, model: str, number: int, rng: random.Random) -> None:
        """A stream that is left after a few events; what came until then is checked too."""
        left, ids = rng.randrange(5), []
        body = self._body(model, number) | {"stream": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                self._storm.wrong.append(f"{model}: {response.status_code}")
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self._storm.wrong.append(f"{model}: {line[:200]}")
                    ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                if not left:
                    break
                left -= 1
            self._check(model, number, response.headers, ids, whole=False)
        self._storm.num_cancelled += 1

    def _check(
        self, model: str, number: int, headers: httpx.Headers, ids: list[int], *, whole: bool = True
    ) -> None:
        storm = self._storm
        digest, spelling = headers.get("x-softprompt-adapter-digest"), headers.get("x-softprompt-adapter")
        if model == _BASE:
            content, wanted = len(storm.digests), None
        else:
            content = storm.digests.index(digest)
            wanted = model if model.startswith("sha256:") else storm.versions.get(model)
            if storm.seen.setdefault(spelling, digest) != digest:
                storm.wrong.append(f"{spelling} was {storm.seen[spelling]} and is {digest}")
        if wanted not in (None, digest):
            storm.wrong.append(f"{model} was answered with {digest}")
        expected = self._solo[content][number]
        if ids != (expected if whole else expected[: len(ids)]):
            storm.wrong.append(f"{model} ({spelling}), prompt {number}: {ids} and not {expected}")


@pytest.mark.parametrize(
    ("num_requests", "num_users"),
    [
        (60, 6),
        pytest.param(2_000, 16, marks=pytest.mark.chaos),
        pytest.param(10_000, 16, marks=pytest.mark.chaos),
    ],
)
async def test_every_output_in_a_storm_equals_its_solo_output(
    make_store: Any,
    make_registry: Any,
    make_inference: Any,
    make_gateway: Any,
    connect: Any,
    adapter: Any,
    tiny_model: Path,
    tmp_path: Path,
    eventually: Callable[..., Any],
    num_requests: int,
    num_users: int,
) -> None:
    rng = random.Random(num_requests)
    make = partial(adapter, hidden_size=64)
    # Some of equal length: a mix-up must not show by that alone.
    contents = [make(seed, num_virtual_tokens=(5, 5, 16, 21)[seed % 4]) for seed in range(_NUM_CONTENTS)]
    prompts = make_prompts(rng)
    solo = solo_outputs(tiny_model, contents, prompts, tmp_path)
    assert len({tuple(ids) for by_prompt in solo for ids in by_prompt}) == len(solo) * len(prompts)

    registry = make_registry(make_store())
    # Three places for eight adapters, a host cache for two, and pages for a fraction of what the users ask for.
    inference = make_inference(
        registry, max_prompt_adapters=3, adapter_cache_bytes=9_000, kv_cache_bytes=4 * 2**20, max_num_sequences=12
    )
    gateway = make_gateway(registry, inference)
    client, storm, stop = connect(registry.address), Storm(), asyncio.Event()
    for number, content in enumerate(contents):
        made = await client.register(_NAMES[number % len(_NAMES)], content)
        storm.versions[f"{made.name}@{made.version}"] = made.digest
        storm.digests.append(made.digest)
    for name in _NAMES:
        await client.set_alias(name, "prod", 1)

    limits = httpx.Limits(max_connections=num_users + 4)
    async with (
        open_channel(inference.address) as channel,
        httpx.AsyncClient(base_url=gateway.url, timeout=120, limits=limits) as http,
    ):
        stub = InferenceServiceStub(channel)
        changing = asyncio.create_task(change(storm, client, stub, contents, random.Random(rng.random()), stop))
        users = Users(storm, http, prompts, solo)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_users):
                    group.create_task(users.run(random.Random(rng.random()), num_requests))
        finally:
            stop.set()
            await changing
        assert storm.wrong == []
        assert all(storm.versions[spelling] == digest for spelling, digest in storm.seen.items())

        async def is_idle() -> bool:
            load = await stub.GetLoad(inference_pb2.GetLoadRequest())
            return (load.running, load.waiting, load.used_pages) == (0, 0, 0)

        await eventually(is_idle)
    assert storm.num_whole + storm.num_cancelled == storm.num_asked >= num_requests
    assert storm.num_cancelled > num_requests / 10
    assert storm.num_evicted, "nothing was evicted; the test proves less"
