import pytest

from benchmarks import goals
from benchmarks.bench import PEERS
from benchmarks.goals import Goal
from benchmarks.sizes import FULL

GOALS = [
    goal
    for value in vars(goals).values()
    for goal in (value.values() if isinstance(value, dict) else [value])
    if isinstance(goal, Goal)
]


@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal.stretch is not None])
def test_to_stretch_is_more_than_must(goal: Goal) -> None:
    assert goal.must is not None
    assert goal.stretch is not None
    assert (goal.stretch < goal.must) if goal.at_most else (goal.stretch > goal.must)


def test_a_full_run_measures_all_that_is_demanded() -> None:
    assert set(goals.ONE_ADAPTER) == set(PEERS)
    assert {*goals.MANY_OVER_ONE, *goals.MANY_OVER_PEFT} <= set(FULL.adapter_counts)
    assert {*goals.FIRST_TOKEN_GROWTH, *goals.LONG_OVER_PEFT, *goals.SHARING} <= set(FULL.virtual_tokens)


def test_a_full_run_is_of_the_scale_that_is_promised() -> None:
    assert (FULL.registered, FULL.asked) == (100_000, 10_000)
