"""Steps launched ahead of their tokens choose what steps that wait for them choose."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_api.params import SamplingParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import (
    Abort,
    AddRequest,
    DropAdapter,
    Finish,
    Output,
    SoftPromptPart,
    TextPart,
)
from softprompt_inference.engine.plan import StepPlan
from softprompt_inference.model.runner import ModelRunner
from softprompt_inference.model.sampler import Choices

EVERY_WAY = [
    SamplingParams(temperature=0.0, max_tokens=30, logprobs=1),
    SamplingParams(temperature=0.0, max_tokens=7),
    SamplingParams(temperature=1.3, max_tokens=25, logprobs=0),
    SamplingParams(top_p=0.97, max_tokens=30, logprobs=3),
    SamplingParams(top_k=20, max_tokens=19),
    SamplingParams(top_k=5, top_p=0.8, max_tokens=28),
    SamplingParams(min_p=0.01, top_p=0.999, max_tokens=30),
    SamplingParams(temperature=1.5, max_tokens=30, stop_token_ids=range(5, 25)),
    SamplingParams(temperature=1.5, max_tokens=30, min_tokens=10, stop_token_ids=range(5, 60)),
    SamplingParams(max_tokens=22, logit_bias={7: 3.0, 9: -50.0}),
]


def make_requests(adapters: list[str], params: list[SamplingParams]) -> list[AddRequest]:
    """One for each way to sample, with and without adapters, texts of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for i, own in enumerate(params):
        text = torch.randint(3, 256, (9 + 3 * i % 17,), generator=generator).tolist()
        prompt: list[TextPart | SoftPromptPart] = [TextPart(token_ids=text)]
        if i % 2:
            prompt.insert(0, SoftPromptPart(digest=adapters[i // 2 % len(adapters)]))
        requests.append(AddRequest(request_id=str(i), prompt=prompt, params=own, seed=i))
    return requests


def serve(engine: Engine, requests: list[AddRequest]) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.handle(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error_message
            outputs[output.request_id].append(output)
        engine.check()
    return outputs


def assert_same(actual: dict[str, list[Output]], expected: dict[str, list[Output]]) -> None:
    """The same tokens, ends and logprobs; these only up to rounding, as batches may be composed otherwise."""
    for request_id, own in expected.items():
        others = actual[request_id]
        assert [output.token_id for output in others] == [output.token_id for output in own]
        assert [replace(output, logprobs=None) for output in others] == [
            replace(output, logprobs=None) for output in own
        ]
        for output, other in zip(own, others, strict=True):
            assert (output.logprobs is None) == (other.logprobs is None)
            if output.logprobs is not None and other.logprobs is not None:
                assert other.logprobs.chosen == pytest.approx(output.logprobs.chosen, abs=1e-4)
                assert len(other.logprobs.top) == len(output.logprobs.top)


def count_follows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the steps that are launched ahead, as they happen."""
    sizes: list[int] = []
    launch = ModelRunner.launch

    def count(self: ModelRunner, plan: StepPlan) -> Choices:
        if plan.follows:
            sizes.append(len(plan.follows))
        return launch(self, plan)

    monkeypatch.setattr(ModelRunner, "launch", count)
    return sizes


def engine_over(runner: ModelRunner, *, look_ahead: bool, **settings: Any) -> Engine:
    return Engine(runner, EngineConfig(model_path="", look_ahead=look_ahead, **settings))


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 11}, {"max_num_sequences": 3}])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_adapters_and_base_in_one_batch_equal_peft(lab: Any, name: str, settings: dict[str, int]) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, "prompt_tuning", 5), lab.adapter(path, "prompt_tuning", 20), None]
    requests = lab.requests([*adapters, *adapters], length=14, max_tokens=20)
    outputs = lab.serve(lab.engine(path, look_ahead=True, **settings), requests)
    lab.compare(path, requests, outputs).assert_equal()


@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_preempted_requests_equal_peft(
    lab: Any, llama: Path, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [lab.adapter(llama, "prompt_tuning", 20), lab.adapter(llama, "prompt_tuning", 5), None, None]
    requests = lab.requests([*adapters, *adapters], max_tokens=30)
    settings = {"page_size": page_size, "kv_cache_bytes": 120 * 256, "max_model_len": 80}
    engine = lab.engine(llama, look_ahead=True, **settings)
    sizes = count_follows(monkeypatch)
    outputs = lab.serve(engine, requests)
    assert engine.step().stats.preemptions > 0
    assert sizes
    lab.compare(llama, requests, outputs).assert_equal()


def test_every_way_to_sample_gives_the_same_outputs(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = lab.runner(llama)
    adapters = [lab.adapter(llama, "prompt_tuning", count).load for count in (5, 20)]
    requests = make_requests([adapter.digest for adapter in adapters], EVERY_WAY)
    results, num_follows = [], []
    sizes = count_follows(monkeypatch)
    for look_ahead in (False, True):
        engine = engine_over(runner, look_ahead=look_ahead)
        for adapter in adapters:
            engine.handle(adapter)
        results.append(serve(engine, requests))
        for adapter in adapters:
            engine.handle(DropAdapter(digest=adapter.digest))
        num_follows.append(len(sizes))
    assert num_follows[0] == 0 < num_follows[1]
    assert_same(results[1], results[0])
    assert {outputs[-1].finish for outputs in results[0].values()} == {Finish.STOP, Finish.LENGTH}


def test_penalised_requests_among_others_give_the_same_outputs(lab: Any, llama: Path) -> None:
    runner = lab.runner(llama)
    ways = [SamplingParams(max_tokens=6, repetition_penalty=1.3), *EVERY_WAY[:4]]
    requests = make_requests(["none"], ways)[::2]
    expected, actual = (serve(engine_over(runner, look_ahead=ahead), requests) for ahead in (False, True))
    assert_same(actual, expected)


def test_requests_and_adapters_that_come_and_go_leave_the_others_as_they_are(lab: Any, llama: Path) -> None:
    adapters = [lab.adapter(llama, "prompt_tuning", 20, seed=seed) for seed in range(3)]
    requests = lab.requests([*adapters, None], max_tokens=30)
    alone = [lab.serve(lab.engine(llama), [request])[0] for request in requests]
    engine = lab.engine(llama, look_ahead=True)
    lab.submit(engine, requests[:2])
    outputs: dict[str, list[Output]] = {str(i): [] for i in range(4)}
    late = make_requests([adapters[2].load.digest], EVERY_WAY[:4])
    for step in range(200):
        if step == 4:
            engine.handle(Abort(request_id="0"))
            engine.handle(DropAdapter(digest=adapters[0].load.digest))
        if step == 5:
            engine.handle(adapters[2].load)
            engine.handle(replace(late[1], request_id="late"))
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert not engine.has_work
    for i in (0, 1):
        own = [output.token_id for output in outputs[str(i)]]
        assert own == [output.token_id for output in alone[i]][: len(own)]
    assert 0 < len(outputs["0"]) < 30
    assert len(outputs["1"]) == 30
    assert len(outputs["late"]) == EVERY_WAY[1].max_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_gpu_chooses_the_same_and_never_waits_in_a_step_that_follows(
    lab: Any, name: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lab.model(name)
    runner = lab.runner(path, device="cuda", max_num_sequences=12)
    if not graphs:
        runner.allocate_pages(runner.info.num_pages)
    adapters = [lab.adapter(path, "prompt_tuning", count).load for count in (5, 20)]
    requests = make_requests([adapter.digest for adapter in adapters], EVERY_WAY)

    def outputs(*, look_ahead: bool) -> dict[str, list[Output]]:
        engine = engine_over(runner, look_ahead=look_ahead)
        for adapter in adapters:
            engine.handle(adapter)
        served = serve(engine, requests)
        for adapter in adapters:
            engine.handle(DropAdapter(digest=adapter.digest))
        return served

    expected = outputs(look_ahead=False)
    assert_same(outputs(look_ahead=True), expected)  # Triton has compiled all of its kernels now
    num_follows = 0
    launch: Callable[[ModelRunner, StepPlan], Choices] = ModelRunner.launch

    def refuse_to_wait(self: ModelRunner, plan: StepPlan) -> Choices:
        nonlocal num_follows
        if not plan.follows:
            return launch(self, plan)
        num_follows += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(self, plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ModelRunner, "launch", refuse_to_wait)
    assert_same(outputs(look_ahead=True), expected)
    assert num_follows > 20
