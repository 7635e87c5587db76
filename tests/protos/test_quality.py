"""What norms and effects are told as."""

from dataclasses import replace

import pytest
from softprompt_api.quality import NO_EFFECT_KL, Effect, Norms, Probe, norm_warning

VOCABULARY = Norms(low=1.0, median=1.5, high=2.0)
EFFECT = Effect(mean_kl=0.5, max_kl=1.0, num_flips=2, num_prompts=8)


@pytest.mark.parametrize(
    ("rows", "is_told"),
    [
        (Norms(low=1.0, median=1.2, high=2.0), False),
        (Norms(low=0.25, median=1.0, high=8.0), False),
        (Norms(low=0.24, median=1.0, high=2.0), True),
        (Norms(low=1.0, median=2.0, high=8.1), True),
        (None, False),
    ],
)
def test_rows_are_told_of_where_they_are_far_longer_or_shorter_than_the_vocabulary(
    rows: Norms | None, is_told: bool
) -> None:
    assert bool(norm_warning(rows, VOCABULARY)) == is_told
    assert norm_warning(rows, None) == ""


def test_the_warning_has_the_numbers_of_both() -> None:
    warning = norm_warning(Norms(low=20.5, median=24.25, high=30.0), VOCABULARY)
    assert "20.5 to 30 (median 24.2)" in warning
    assert "1 to 2 (median 1.5)" in warning


def test_an_effect_is_none_where_it_is_below_what_rounding_makes_and_no_token_changes() -> None:
    assert not EFFECT.is_none
    least = replace(EFFECT, mean_kl=NO_EFFECT_KL / 2, num_flips=0)
    assert least.is_none
    assert not replace(least, num_flips=1).is_none
    assert not replace(least, mean_kl=NO_EFFECT_KL).is_none


def test_a_probe_warns_of_each_task_that_does_nothing() -> None:
    nothing = Effect(task=1, mean_kl=1e-6, max_kl=2e-6, num_flips=0, num_prompts=8)
    probe = Probe(effects=(replace(EFFECT, task=0), nothing), base_model_id="org/Tiny", dtype="float32")
    [warning] = probe.warnings
    assert warning.startswith("task 1 changes next to nothing: mean KL 1e-06 nats")
    assert Probe(effects=(EFFECT,), base_model_id="org/Tiny", dtype="float32").warnings == []
