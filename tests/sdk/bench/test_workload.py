"""What a run sends: the same for the same seed, and distributed as asked."""

import math
import random
from itertools import pairwise

import pytest
from softprompt.bench.workload import (
    LengthRange,
    RandomPrompts,
    Request,
    arrival_times,
    make_workload,
    zipf_weights,
)

WORDS = ("one", "two", "three")


def workload(**changes: object) -> list[Request]:
    lengths = LengthRange(least=2, most=5)
    options = {
        "num": 40,
        "models": ["base"],
        "alpha": 0.0,
        "prompts": RandomPrompts(lengths=lengths, token_ids=range(100, 200), words=WORDS),
        "output_lengths": LengthRange(least=3, most=4),
        "rate": math.inf,
        "seed": 7,
    }
    return make_workload(**(options | changes))  # type: ignore[arg-type]


def test_without_a_rate_all_are_due_at_once() -> None:
    assert arrival_times(3, math.inf, random.Random(0)) == [0.0, 0.0, 0.0]


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(20_000, 50.0, random.Random(1))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    # Gaps are exponential: mean and deviation are 1/rate, and 1/e of them are longer than the mean.
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert math.sqrt(variance) == pytest.approx(1 / 50, rel=0.03)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, rel=0.03)
    assert times == sorted(times)


def test_zipf_weights_fall_with_the_rank() -> None:
    assert zipf_weights(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_weights(2, 2.0) == pytest.approx([0.8, 0.2])
    assert zipf_weights(4, 0.0) == [0.25] * 4
    assert zipf_weights(1, 1.5) == [1.0]


def test_models_are_drawn_by_their_popularity() -> None:
    models = [request.model for request in workload(num=11_000, models=["a", "b", "c"], alpha=1.0)]
    assert models.count("a") / 11_000 == pytest.approx(6 / 11, abs=0.02)
    assert models.count("b") / 11_000 == pytest.approx(3 / 11, abs=0.02)


def test_the_same_seed_is_the_same_run() -> None:
    assert workload() == workload()
    assert workload() != workload(seed=8)


def test_another_rate_or_other_models_leave_the_prompts_as_they_are() -> None:
    changed = workload(rate=3.0, models=["a", "b"])
    assert [request.prompt for request in changed] == [request.prompt for request in workload()]
    assert [request.output_len for request in changed] == [request.output_len for request in workload()]


def test_lengths_and_tokens_are_within_what_was_asked_for() -> None:
    requests = workload(num=400)
    assert {len(request.prompt) for request in requests} == {2, 3, 4, 5}
    assert {request.output_len for request in requests} == {3, 4}
    assert {token_id for request in requests for token_id in request.prompt} == set(range(100, 200))


def test_without_token_ids_prompts_are_words() -> None:
    prompts = RandomPrompts(lengths=LengthRange(least=4, most=4), token_ids=(), words=WORDS)
    [request] = workload(num=1, prompts=prompts)
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == 4
    assert set(request.prompt.split()) <= set(WORDS)


def test_given_prompts_are_taken_in_turn() -> None:
    assert [request.prompt for request in workload(num=5, prompts=["x", "y"])] == ["x", "y", "x", "y", "x"]


@pytest.mark.parametrize(("text", "least", "most"), [("7", 7, 7), ("1:9", 1, 9), ("3:3", 3, 3)])
def test_a_range_is_one_number_or_two(text: str, least: int, most: int) -> None:
    assert LengthRange.parse(text) == LengthRange(least=least, most=most)


@pytest.mark.parametrize("text", ["", "0", "-1", "5:4", "0:3", "a", "1:b", ":3", "1.5"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the words come from int or are told by the flag)
        LengthRange.parse(text)
