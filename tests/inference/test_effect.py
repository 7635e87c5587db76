"""Divergences of distributions, and what is measured of which adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument, Unavailable
from softprompt_api.formats import Rows
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import MakeWay
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.effect import PROMPTS, EffectProbe, compare, divergence
from softprompt_inference.engine.messages import AddRequest, Finish, Logprobs, Output, SoftPromptPart, TextPart
from softprompt_inference.generation import EngineHandle
from softprompt_inference.prompts import PromptEncoder

DIGEST = "sha256:" + "a" * 64


def logprobs(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, dtype=np.float32))


def test_equal_distributions_do_not_diverge() -> None:
    assert divergence(logprobs(0.5, 0.25, 0.25), logprobs(0.5, 0.25, 0.25)) == 0


def test_the_divergence_is_that_of_the_adapter_from_the_base_model() -> None:
    own, without = logprobs(0.75, 0.25), logprobs(0.5, 0.5)
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert divergence(own, without) == pytest.approx(expected, abs=1e-6)
    assert divergence(without, own) != pytest.approx(expected, abs=1e-3)


def test_tokens_that_a_model_masks_count_for_nothing() -> None:
    assert divergence(logprobs(0.5, 0.5, 0.0), logprobs(0.5, 0.5, 0.0)) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(divergence(logprobs(0.5, 0.5), logprobs(1.0, 0.0)))


def test_an_effect_has_the_mean_the_highest_and_the_flips() -> None:
    without = [logprobs(0.5, 0.25, 0.25)] * 4
    own = [*without[:2], logprobs(0.4, 0.35, 0.25), logprobs(0.25, 0.5, 0.25)]
    effect = compare(own, without, task=3)
    divergences = [divergence(*pair) for pair in zip(own, without, strict=True)]
    assert (effect.task, effect.num_prompts, effect.num_flips) == (3, 4, 1)
    assert effect.max_kl == max(divergences)
    assert effect.mean_kl == pytest.approx(sum(divergences) / 4)


@dataclass
class FakeStream:
    output: Output
    notify: Callable[[], None] = lambda: None

    def follow(self, notify: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(notify)

    def take(self, most: int) -> list[Output]:
        return [self.output]

    def close(self) -> None: ...


@dataclass
class FakeEngine:
    """A model of three tokens: with an adapter, its digest says how likely they are."""

    shares: dict[str, np.ndarray] = field(default_factory=dict)
    requests: list[AddRequest] = field(default_factory=list)
    num_open: int = 0
    error_reason: str = ""

    def submit(self, command: Any) -> None:
        assert isinstance(command, AddRequest)
        self.requests.append(command)

    def outputs(self, request_id: str) -> FakeStream:
        request = self.requests[-1]
        assert request.request_id == request_id
        assert request.all_logprobs
        assert (request.params.max_tokens, request.params.temperature) == (1, 0)
        digest = next((part.digest for part in request.prompt if isinstance(part, SoftPromptPart)), "")
        if self.error_reason:
            output = Output(request_id=request_id, finish=Finish.ERROR, error_reason=self.error_reason)
        else:
            values = self.shares.get(digest, logprobs(0.5, 0.25, 0.25)).astype("<f4").tobytes()
            told = Logprobs(chosen=0.0, top=[], every=values)
            output = Output(request_id=request_id, token_id=0, logprobs=told, finish=Finish.LENGTH)
        return FakeStream(output)


class FakeSource:
    """One adapter, and what is told of it."""

    def __init__(self, num_tasks: int = 0) -> None:
        self.version = pb.AdapterVersion(name="tweets", version=3, digest=DIGEST, num_tasks=num_tasks)
        self.asked: list[str] = []
        self.recorded: list[Any] = []
        self.is_away = False

    async def resolve(self, spelling: str) -> pb.AdapterVersion:
        self.asked.append(spelling)
        return self.version

    async def resolve_to_fetch(self, name: str) -> pb.AdapterVersion:
        return await self.resolve(name)

    async def record(self, version: pb.AdapterVersion, probe: Any) -> pb.AdapterVersion:
        if self.is_away:
            raise Unavailable("the adapter registry cannot be reached")
        self.recorded.append((version.digest, probe))
        return version


class FakePrompts:
    async def encode(self, prompt: Any) -> list[list[int]]:
        return [[len(prompt.text)]]


def make(engine: FakeEngine, source: FakeSource, *, idle_s: Callable[[], float] = lambda: 0.0) -> EffectProbe:
    async def fetch(digest: str, make_way: MakeWay) -> Adapter:
        return Adapter(
            digest=digest, content=Rows(data=bytes(8), dtype="float32", num_virtual_tokens=1, row_size=2)
        )

    residency = Residency(
        fetch=fetch,
        load=lambda _: None,
        drop=lambda _: None,
        max_adapters=1,
        max_rows=4,
        max_key_value_rows=4,
        max_loras=1,
        host_cache=HostCache(0),
    )
    return EffectProbe(
        cast(EngineHandle, engine),
        cast(PromptEncoder, FakePrompts()),
        residency,
        cast(AdapterSource, source),
        pb.BaseModel(id="org/Base", dtype="bfloat16"),
        idle_s=idle_s,
    )


async def test_an_adapter_is_measured_beside_the_base_model_and_recorded() -> None:
    engine, source = FakeEngine(shares={DIGEST: logprobs(0.25, 0.5, 0.25)}), FakeSource()
    probe = make(engine, source)
    assert await probe.probe("tweets@prod") is source.version
    assert source.asked == ["tweets@prod"]
    [(digest, told)] = source.recorded
    assert (digest, told.base_model_id, told.dtype) == (DIGEST, "org/Base", "bfloat16")
    [effect] = told.effects
    assert (effect.task, effect.num_flips, effect.num_prompts) == (None, len(PROMPTS), len(PROMPTS))
    assert effect.mean_kl == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert [part for request in engine.requests for part in request.prompt if isinstance(part, TextPart)] == [
        TextPart(token_ids=[len(text)]) for text in PROMPTS
    ] * 2
    assert {request.salt for request in engine.requests} == {"probe"}, "a tenant's KV is the tenant's"


async def test_the_base_model_is_measured_once_for_all() -> None:
    engine = FakeEngine()
    probe = make(engine, FakeSource())
    await asyncio.gather(*(probe.probe("tweets") for _ in range(3)))
    assert len(engine.requests) == 4 * len(PROMPTS)


async def test_every_task_is_measured_as_it_is_served_up_to_a_limit() -> None:
    engine, source = FakeEngine(shares={f"{DIGEST}:1": logprobs(0.25, 0.5, 0.25)}), FakeSource(num_tasks=20)
    await make(engine, source).probe("tweets")
    [(_, told)] = source.recorded
    assert [effect.task for effect in told.effects] == list(range(16))
    assert [effect.is_none for effect in told.effects[:3]] == [True, False, True]


async def test_a_single_task_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="leave ':0' out"):
        await make(FakeEngine(), FakeSource(num_tasks=2)).probe("tweets:0")


async def test_what_stops_a_measurement_is_told_and_nothing_is_recorded() -> None:
    source = FakeSource()
    with pytest.raises(ContextLengthExceeded):
        await make(FakeEngine(error_reason="CONTEXT_LENGTH_EXCEEDED"), source).probe("tweets")
    assert source.recorded == []
    source.is_away = True
    with pytest.raises(Unavailable):
        await make(FakeEngine(), source).probe("tweets")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the probe slept each time; no time passes."""
    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return seconds


async def test_whoever_asks_now_is_not_made_to_wait_for_a_lull(slept: list[float]) -> None:
    source = FakeSource()
    await make(FakeEngine(), source).probe("tweets")
    assert (slept, len(source.recorded)) == ([], 1)


async def test_what_has_time_waits_until_nobody_has_been_served_for_a_second(slept: list[float]) -> None:
    idle_s = iter([0.0, 0.25, 1.0])  # a completion runs, has just ended, and ended long ago
    source = FakeSource()
    await make(FakeEngine(), source, idle_s=lambda: next(idle_s)).probe("tweets", patience_s=9.0)
    assert (slept, len(source.recorded)) == ([1.0, 1.0, 0.75], 1)


async def test_patience_has_an_end() -> None:
    source = FakeSource()
    await make(FakeEngine(), source).probe("tweets", patience_s=0.01)
    assert len(source.recorded) == 1


async def test_what_was_measured_while_it_waited_is_not_measured_again(slept: list[float]) -> None:
    engine, source = FakeEngine(), FakeSource()
    source.version.probe.SetInParent()
    probe = make(engine, source, idle_s=lambda: 1.0)
    assert await probe.probe("tweets", patience_s=9.0) is source.version
    assert engine.requests == []
    await probe.probe("tweets")
    assert len(source.recorded) == 1, "whoever asks now gets a new one"
