"""In a storm of registrations, moved aliases, evictions and cancellations every answer is its own adapters'."""

import asyncio
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
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

_NUM_PROMPTS = 4
_PREFIX_TOKENS = 600
_PAUSE_S = 0.03
_MAX_LONGER = 5
_BASE = "tiny"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sort:
    """Names whose versions are made of the same contents, again and again.

    Attributes:
        contents: what make_adapter is told.
        tasks: what stands behind the spelling of a version, or of its digest, where it is a model.
    """

    names: tuple[str, ...]
    contents: tuple[Mapping[str, Any], ...]
    tasks: tuple[str, ...] = ("",)


# Some of equal length: a mix-up must not show by that alone. Keys and values are large, to tell beside the prompt.
_SOFT = Sort(
    names=("red", "green", "blue", "grey"),
    contents=(
        *({"seed": seed, "num_virtual_tokens": (16, 16, 21, 40)[seed]} for seed in range(4)),
        *({"seed": seed, "num_virtual_tokens": 16, "kind": "prefix_tuning", "std": 6.0} for seed in (4, 5)),
    ),
)
_MANY = Sort(
    names=("many",),
    contents=tuple({"seed": seed, "num_virtual_tokens": 16, "kind": "multitask"} for seed in (6, 7)),
    tasks=(":0", ":1"),
)
_LORA = Sort(names=("loud", "low"), contents=tuple({"seed": seed, "kind": "lora"} for seed in (8, 9, 10)))
_SORTS = (_SOFT, _MANY, _LORA)


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


class Solo:
    """What each request gives alone, with nothing shared or cached.

    Args:
        folders: the adapter of each digest.
    """

    def __init__(self, model: Path, folders: dict[str, Path], prompts: list[Asked]) -> None:
        from softprompt import LLM

        self._llm = LLM(
            model=str(model),
            dtype="float32",
            device="cpu",
            max_model_len=1024,
            enable_prefix_caching=False,
            kv_cache_gb=0.05,
        )
        self._folders = folders
        self._prompts = prompts
        self._ids = {digest: number for number, digest in enumerate(folders, 1)}
        self._known: dict[tuple[str, int], list[int]] = {}

    def output(self, digests: str, number: int) -> list[int]:
        """The ids of a prompt with adapters, as an answer names their digests; "": the base model."""
        if (digests, number) not in self._known:
            self._known[digests, number] = self._compute(digests.split("+") if digests else [], number)
        return self._known[digests, number]

    def share_told_apart(self) -> float:
        """How many different outputs there are of each that was asked for."""
        return len(set(map(tuple, self._known.values()))) / len(self._known)

    def _compute(self, digests: list[str], number: int) -> list[int]:
        from softprompt import LoRARequest, PromptAdapterRequest, SamplingParams

        soft, lora = None, None
        for spelled in digests:
            scheme, digest, *task = spelled.split(":")
            known = f"{scheme}:{digest}"
            folder, adapter_id = self._folders[known], self._ids[known]
            if json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA":
                lora = LoRARequest(f"content{adapter_id}", adapter_id, folder)
            else:
                of_task = int(task[0]) if task else None
                soft = PromptAdapterRequest(
                    f"content{adapter_id}", adapter_id, folder, prompt_adapter_task=of_task
                )
        asked = self._prompts[number]
        [output] = self._llm.generate(
            [{"prompt_token_ids": asked.prompt_ids}],
            SamplingParams(temperature=0, max_tokens=asked.max_tokens, ignore_eos=True),
            prompt_adapter_request=soft,
            lora_request=lora,
            use_tqdm=False,
        )
        return list(output.outputs[0].token_ids)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request got: the digests of its adapters, joined by '+', and its ids, all or the first ones."""

    digests: str
    number: int
    ids: tuple[int, ...]
    whole: bool


@dataclass(kw_only=True)
class Storm:
    """What is true by now, and what was seen.

    Attributes:
        digests: of each sort's contents, with each task.
        versions: `name@number`, with each task, to the digest that its registration was told.
        numbers: of each name's versions.
        seen: `name@number` to the digest that an answer was made with.
        answers: all, each to the model that was asked for.
        num_evicted: of each sort.
    """

    digests: dict[Sort, set[str]] = field(default_factory=lambda: {sort: set() for sort in _SORTS})
    versions: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[str, str] = field(default_factory=dict)
    answers: dict[Answer, str] = field(default_factory=dict)
    num_evicted: dict[Sort, int] = field(default_factory=lambda: dict.fromkeys(_SORTS, 0))
    num_asked: int = 0
    num_whole: int = 0
    num_cancelled: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def has_evicted(self) -> bool:
        return all(self.num_evicted.values())

    async def register(self, registry: Any, sort: Sort, name: str, content: Any) -> str:
        """Make a version; its digest."""
        made = await registry.register(name, content)
        self.numbers[name].append(made.version)
        for task in sort.tasks:
            self.versions[f"{name}@{made.version}{task}"] = made.digest + task
            self.digests[sort].add(made.digest + task)
        return str(made.digest)

    async def evict(self, inference: Any, digest: str) -> None:
        """Let an adapter go, where it is in memory and nobody uses it."""
        [sort] = [sort for sort in _SORTS if digest in self.digests[sort]]
        with contextlib.suppress(AdapterInUse, AdapterNotFound):
            try:
                await inference.Evict(inference_pb2.EvictRequest(adapter=digest))
                self.num_evicted[sort] += 1
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None


async def change(
    storm: Storm,
    registry: Any,
    inference: Any,
    contents: dict[Sort, list[Any]],
    rng: random.Random,
    stop: asyncio.Event,
) -> None:
    """Register, move an alias, or evict, every few milliseconds."""
    while not stop.is_set():
        kind, sort = rng.choice(("register", "alias", "rollback", "evict", "evict")), rng.choice(_SORTS)
        name = rng.choice(sort.names)
        if kind == "register":
            await storm.register(registry, sort, name, rng.choice(contents[sort]))
        elif kind == "evict":
            held = await inference.ListResident(inference_pb2.ListResidentRequest())
            idle = {one.digest for one in held.adapters if not one.in_use} & storm.digests[sort]
            await storm.evict(inference, rng.choice(sorted(idle or storm.digests[sort])))
        else:
            alias = "prod" if kind == "alias" else "latest"
            await registry.set_alias(name, alias, rng.choice(storm.numbers[name]))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PAUSE_S)


class Users:
    """Clients that ask, check what they are told, and sometimes leave early."""

    def __init__(self, storm: Storm, http: httpx.AsyncClient, prompts: list[Asked]) -> None:
        self._storm = storm
        self._http = http
        self._prompts = prompts

    async def run(self, rng: random.Random, num_requests: int) -> None:
        """Ask until all have asked so often together, and longer until each sort was evicted, up to a limit."""
        storm = self._storm
        while not storm.wrong and storm.num_asked < num_requests * (1 if storm.has_evicted else _MAX_LONGER):
            storm.num_asked += 1
            number = rng.randrange(len(self._prompts))
            model = self._model(rng)
            if rng.random() < 0.3:
                await self._leave_early(model, number, rng)
            else:
                await self._ask(model, number)

    def _model(self, rng: random.Random) -> str:
        match rng.randrange(10):
            case 0:
                return _BASE
            case 1 | 2 | 3:
                return self._spelled(_SOFT, rng)
            case 4 | 5:
                return self._spelled(_MANY, rng)
            case 6 | 7:
                return self._spelled(_LORA, rng)
        return f"{self._spelled(rng.choice((_SOFT, _MANY)), rng)}+{self._spelled(_LORA, rng)}"

    def _spelled(self, sort: Sort, rng: random.Random) -> str:
        kind, name, task = rng.randrange(9), rng.choice(sort.names), rng.choice(sort.tasks)
        if kind < 2:
            return rng.choice(sorted(self._storm.digests[sort]))
        if kind < 4:
            return f"{name}@{rng.choice(self._storm.numbers[name])}{task}"
        return name + ("@prod" if kind < 6 else "") + task

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
        spellings, digests = (headers.get(f"x-softprompt-adapter{which}", "") for which in ("", "-digest"))
        asked = "" if model == _BASE else model
        for part, spelling, digest in zip(asked.split("+"), spellings.split("+"), digests.split("+"), strict=True):
            if storm.seen.setdefault(spelling, digest) != digest:
                storm.wrong.append(f"{spelling} was {storm.seen[spelling]} and is {digest}")
            wanted = part if part.startswith("sha256:") else storm.versions.get(part, digest)
            if digest != wanted or bool(digest) != bool(part):
                storm.wrong.append(f"{model} was answered with {digests} ({spellings})")
        storm.answers[Answer(digests=digests, number=number, ids=tuple(ids), whole=whole)] = model


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
    read_adapter: Callable[[Path], Any],
    make_adapter: Callable[..., Path],
    tiny_model: Path,
    eventually: Callable[..., Any],
    num_requests: int,
    num_users: int,
) -> None:
    rng = random.Random(num_requests)
    prompts = make_prompts(rng)
    folders = {sort: [make_adapter(**content) for content in sort.contents] for sort in _SORTS}
    contents = {sort: list(map(read_adapter, folders[sort])) for sort in _SORTS}

    registry = make_registry(make_store())
    # Three places for ten soft prompts and two for three LoRAs, a host cache for one LoRA and a few soft prompts,
    # and pages for a fraction of what the users ask for.
    inference = make_inference(
        registry,
        max_prompt_adapters=3,
        max_loras=2,
        adapter_cache_bytes=48_000,
        kv_cache_bytes=4 * 2**20,
        max_num_sequences=12,
    )
    gateway = make_gateway(registry, inference)
    client, storm, stop = connect(registry.address), Storm(), asyncio.Event()
    folder_of: dict[str, Path] = {}
    for sort in _SORTS:
        for content, folder, name in zip(contents[sort], folders[sort], cycle(sort.names), strict=False):
            folder_of[await storm.register(client, sort, name, content)] = folder
        for name in sort.names:
            await client.set_alias(name, "prod", 1)

    limits = httpx.Limits(max_connections=num_users + 4)
    async with (
        open_channel(inference.address) as channel,
        httpx.AsyncClient(base_url=gateway.url, timeout=120, limits=limits) as http,
    ):
        stub = InferenceServiceStub(channel)
        changing = asyncio.create_task(change(storm, client, stub, contents, random.Random(rng.random()), stop))
        users = Users(storm, http, prompts)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_users):
                    group.create_task(users.run(random.Random(rng.random()), num_requests))
        finally:
            stop.set()
            await changing
        assert storm.wrong == []
        assert all(storm.versions.get(spelling, "") == digest for spelling, digest in storm.seen.items())

        async def is_idle() -> bool:
            load = await stub.GetLoad(inference_pb2.GetLoadRequest())
            return (load.running, load.waiting, load.used_pages) == (0, 0, 0)

        await eventually(is_idle)
    assert storm.num_whole + storm.num_cancelled == storm.num_asked >= num_requests
    assert storm.num_cancelled > num_requests / 10
    assert storm.has_evicted, "a sort was not evicted; the test proves less"

    solo = Solo(tiny_model, folder_of, prompts)
    for answer, model in storm.answers.items():
        expected = solo.output(answer.digests, answer.number)
        told = f"{model} ({answer.digests}), prompt {answer.number}"
        assert list(answer.ids) == (expected if answer.whole else expected[: len(answer.ids)]), told
    # Short outputs may be the same by chance; a mix-up would show in the others.
    assert solo.share_told_apart() > 0.9
