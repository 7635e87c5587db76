"""How likely a prompt is, for the engine: which logits are asked for, when, and what is told."""

from typing import Any

import pytest
from softprompt_api.params import SamplingParams
from softprompt_inference.engine import scheduler
from softprompt_inference.engine.messages import AddRequest, Finish, LoadAdapter, Logprobs, Output
from softprompt_inference.engine.plan import Sampled

ASKS = SamplingParams(max_tokens=1, prompt_logprobs=1)


def told(outputs: list[Output]) -> list[Logprobs | None]:
    return [each for output in outputs for each in output.prompt_logprobs or ()]


def serve(fakes: Any, engine: Any, *sent: AddRequest) -> list[list[Output]]:
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    return [outputs[request.request_id] for request in sent]


@pytest.fixture
def adapters(fakes: Any) -> list[LoadAdapter]:
    return [fakes.adapter("a", 6), fakes.adapter("k", 6, are_key_values=True)]


@pytest.mark.parametrize("max_step_tokens", [1, 3, 16])
@pytest.mark.parametrize(
    ("parts", "num_unpredicted"),
    [
        ([[7, 8, 9]], 1),
        ([[7]], 1),
        (["a", [7, 8, 9]], 0),
        (["a", [7]], 0),
        (["k", [7, 8, 9]], 1),
        (["k", [7]], 1),
        (["k", "a", [7, 8]], 0),
        ([[7, 8], "a", [9]], 1),
        (["a"], 0),
    ],
)
def test_every_token_of_the_text_is_told_and_the_first_that_is_computed_is_predicted_by_nothing(
    fakes: Any, adapters: list[LoadAdapter], parts: list[Any], num_unpredicted: int, max_step_tokens: int
) -> None:
    engine = fakes.engine(fakes.runner(), max_step_tokens=max_step_tokens)
    for adapter in adapters:
        engine.handle(adapter)
    request = fakes.request("0", *parts, params=ASKS)
    for _ in range(2):  # the second time with all that the first has left behind
        [outputs] = serve(fakes, engine, request)
        assert told(outputs) == fakes.scores(request, adapters)
        assert told(outputs).count(None) == num_unpredicted
        assert outputs[-1].finish is Finish.LENGTH
        assert outputs[-1].prompt_logprobs is None


def test_a_warm_soft_prompt_is_found_but_for_its_last_virtual_token_which_predicts_the_text(
    fakes: Any, adapters: list[LoadAdapter]
) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    for adapter in adapters:
        engine.handle(adapter)
    serve(fakes, engine, fakes.request("0", "a", [7, 8, 9, 9, 9]))
    runner.plans.clear()
    [outputs] = serve(fakes, engine, fakes.request("1", "a", [7, 8, 9, 9, 9], params=ASKS))
    assert runner.computed_ids == [55, 7, 8, 9, 9, 9]
    assert outputs[-1].cached_tokens == 5


def test_others_find_what_a_prompt_that_was_told_has_computed(fakes: Any) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    serve(fakes, engine, fakes.request("0", range(8), params=ASKS))
    runner.plans.clear()
    serve(fakes, engine, fakes.request("1", range(8), max_tokens=1))
    assert runner.computed_ids == [7]


def test_a_step_has_few_scores_and_nobody_overtakes_a_prompt(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORES", 3)
    runner = fakes.runner()
    engine = fakes.engine(runner)
    asks = [fakes.request(name, [index] * 3, params=ASKS) for index, name in enumerate("abc")]
    outputs = serve(fakes, engine, *asks, fakes.request("d", [9] * 3, max_tokens=1))
    # Two tokens of each prompt are predicted, by those before them: the second prompt is cut behind its first.
    assert [[list(chunk.token_ids) for chunk in plan.chunks] for plan in runner.plans] == [
        [[0, 0, 0], [1]],
        [[1, 1], [2, 2, 2], [9, 9, 9]],
    ]
    for request, own in zip(asks, outputs, strict=False):
        assert told(own) == fakes.scores(request)


def test_a_step_without_room_for_scores_takes_no_prompt_that_asks(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORES", 2)
    runner = fakes.runner()
    serve(fakes, fakes.engine(runner), *(fakes.request(name, [7] * 3, params=ASKS, salt=name) for name in "ab"))
    assert [len(plan.chunks) for plan in runner.plans] == [1, 1]


def test_a_prompt_is_told_once_though_its_request_gave_way(fakes: Any) -> None:
    runner = fakes.runner(num_pages=8)
    engine = fakes.engine(runner, max_num_sequences=4)
    params = SamplingParams(max_tokens=20, prompt_logprobs=0)
    sent = [fakes.request(str(index), [index, 7, 8], params=params, seed=index) for index in range(4)]
    outputs = serve(fakes, engine, *sent)
    assert engine.step().stats.preemptions > 0
    for request, own in zip(sent, outputs, strict=True):
        assert told(own) == fakes.scores(request)
        assert [each.token_id for each in own if each.prompt_logprobs is None] == fakes.solo(request)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=0), SamplingParams(max_tokens=0, prompt_logprobs=0)])
def test_without_tokens_a_request_ends_with_its_prompt(fakes: Any, params: SamplingParams) -> None:
    engine = fakes.engine(fakes.runner(), look_ahead=True)
    request, other = fakes.request("0", [7] * 32, params=params), fakes.request("1", [8], max_tokens=8)
    outputs, beside = serve(fakes, engine, request, other)
    assert outputs[-1] == Output(request_id="0", finish=Finish.LENGTH, cached_tokens=0)
    assert all(output.token_id is None for output in outputs)
    assert [output.token_id for output in beside] == fakes.solo(other)
    stats = engine.step().stats
    assert (stats.running, stats.used_pages, stats.generated_tokens) == (0, 0, 8)


def test_looking_ahead_a_prompt_is_told_before_the_tokens_behind_it(fakes: Any) -> None:
    engine = fakes.engine(fakes.runner(), look_ahead=True)
    request = fakes.request("0", [7, 8], params=SamplingParams(max_tokens=5, prompt_logprobs=0))
    [outputs] = serve(fakes, engine, request)
    assert [output.prompt_logprobs is not None for output in outputs] == [True, False, False, False, False, False]


def test_scores_that_are_not_finite_end_one_request_only(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fakes.runner()
    answer = runner._answer

    def broken(chunk: Any) -> Sampled:
        return Sampled(token_id=None, error="the logits are not finite") if chunk.scores else answer(chunk)

    monkeypatch.setattr(runner, "_answer", broken)
    engine = fakes.engine(runner)
    request, other = fakes.request("0", [7, 8], params=ASKS), fakes.request("1", [8], max_tokens=2)
    outputs, beside = serve(fakes, engine, request, other)
    assert [(output.finish, output.error_reason) for output in outputs] == [(Finish.ERROR, "INTERNAL")]
    assert [output.token_id for output in beside] == fakes.solo(other)
