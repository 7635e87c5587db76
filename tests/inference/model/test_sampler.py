import math
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from softprompt_api.params import SamplingParams
from softprompt_inference.engine.plan import Sample, Sampled
from softprompt_inference.engine.seen import Seen
from softprompt_inference.model import sampler
from softprompt_inference.model.sampler import sample, uniform
from torch import Tensor


def ask(
    *,
    seed: int = 0,
    index: int = 0,
    prompt_ids: tuple[int, ...] = (),
    output_ids: tuple[int, ...] = (),
    banned_ids: tuple[int, ...] = (),
    **params: object,
) -> Sample:
    return Sample(
        params=SamplingParams(**params),
        seed=seed,
        index=index,
        banned_ids=banned_ids,
        seen=Seen(prompt_ids, output_ids) if prompt_ids or output_ids else None,
    )


def one(logits: list[float] | Tensor, s: Sample) -> Sampled:
    return sample(torch.as_tensor(logits)[None], [s])[0]


def drawn(logits: list[float] | Tensor, count: int = 400, **params: object) -> Counter[int]:
    """Tokens over many seeds."""
    samples = [ask(seed=seed, **params) for seed in range(count)]
    row = torch.as_tensor(logits)
    return Counter(result.token_id for result in sample(row.expand(count, -1), samples))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert one([0.0, 3.0, 1.0], ask(temperature=0.0)).token_id == 1


def test_a_vanishing_temperature_is_greedy_and_finite() -> None:
    assert one([0.0, 3e30, 1.0], ask(temperature=1e-30)).token_id == 1


def test_draws_follow_the_probabilities() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = drawn(shares.log(), count=4000)
    for token_id, share in enumerate(shares.tolist()):
        assert counts[token_id] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_temperature_sharpens_and_flattens() -> None:
    logits = [1.0, 0.0]
    cold, warm = drawn(logits, temperature=0.25), drawn(logits, temperature=2.0)
    assert cold[0] > 385
    assert 200 < warm[0] < 300


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(drawn([0.0, 2.0, 1.0, 1.9], top_k=2)) == {1, 3}
    assert set(drawn([0.0, 2.0, 1.0, 1.9], top_k=1)) == {1}


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert set(drawn([0.0, 0.1, 0.2], top_k=1000)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(drawn(logits, top_p=0.45)) == {0}
    assert set(drawn(logits, top_p=0.6)) == {0, 1}
    assert set(drawn(logits, top_p=0.9)) == {0, 1, 2}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of 0.7, the first has 0.57.
    assert set(drawn(logits, top_k=2, top_p=0.55)) == {0}
    assert set(drawn(logits, top_p=0.55)) == {0, 1}


def test_min_p_is_a_share_of_the_likeliest() -> None:
    logits = torch.tensor([0.6, 0.35, 0.05]).log()
    assert set(drawn(logits, min_p=0.5)) == {0, 1}
    assert set(drawn(logits, min_p=1.0)) == {0}


def test_min_p_comes_after_temperature() -> None:
    logits = torch.tensor([0.6, 0.35, 0.05]).log()
    assert set(drawn(logits, min_p=0.25, temperature=2.0)) == {0, 1, 2}


def test_logit_bias_moves_tokens() -> None:
    assert one([0.0, 3.0, 1.0], ask(temperature=0.0, logit_bias={2: 5.0, 1: -1.0})).token_id == 2


def test_banned_ids_are_never_chosen() -> None:
    assert one([0.0, 3.0, 1.0], ask(temperature=0.0, banned_ids=(1,))).token_id == 2
    samples = [ask(seed=seed, banned_ids=(1,)) for seed in range(200)]
    assert {result.token_id for result in sample(torch.tensor([[0.0, 3.0, 1.0]]).expand(200, -1), samples)} == {
        0,
        2,
    }


def test_a_ban_outweighs_a_bias() -> None:
    assert one([0.0, 0.0], ask(temperature=0.0, logit_bias={1: 100.0}, banned_ids=(1,))).token_id == 0


@pytest.mark.parametrize("penalty", [1e-4, 1e-30, 5e-324])
def test_however_small_a_repetition_penalty_is_there_is_a_choice(penalty: float) -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, -2.0]])
    s = ask(temperature=0.0, repetition_penalty=penalty, prompt_ids=(2,), output_ids=(1,))
    [sampled] = sample(logits, [s])
    assert (sampled.error, sampled.token_id) == ("", 1)


def test_repetition_penalty_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    # 4 / 2 = 2 for the prompt's token, −1 · 2 = −2 for the output's.
    s = ask(temperature=0.0, repetition_penalty=2.0, prompt_ids=(0, 0), output_ids=(1,))
    edited = torch.tensor([4.0, -1.0, 2.5])
    sampler._edit(edited, s)
    assert edited.tolist() == [2.0, -2.0, 2.5]
    assert one([4.0, -1.0, 2.5], s).token_id == 2


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    s = ask(presence_penalty=1.0, frequency_penalty=0.5, prompt_ids=(2,), output_ids=(0, 0, 1))
    edited = torch.zeros(3)
    sampler._edit(edited, s)
    assert edited.tolist() == [-2.0, -1.5, 0.0]


def test_penalties_work_together_on_what_was_seen() -> None:
    s = ask(
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        prompt_ids=(1, 3),
        output_ids=(0, 3, 3),
    )
    edited = torch.tensor([4.0, 4.0, 4.0, -4.0])
    sampler._edit(edited, s)
    assert edited.tolist() == [2.0 - 1.5, 2.0, 4.0, -8.0 - 2.0]


def test_edits_do_not_touch_the_callers_logits_or_other_rows() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    results = sample(logits, [ask(temperature=0.0, banned_ids=(0,)), ask(temperature=0.0)])
    assert [result.token_id for result in results] == [1, 0]
    assert logits.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.log_softmax(logits, -1).tolist()
    s = ask(temperature=0.0, logprobs=2, banned_ids=(0,), logit_bias={3: 9.0})
    result = one(logits, s)
    assert result.token_id == 3
    assert result.logprobs is not None
    assert result.logprobs.chosen == pytest.approx(expected[3])
    assert [token_id for token_id, _ in result.logprobs.top] == [0, 1]
    assert [logprob for _, logprob in result.logprobs.top] == pytest.approx(expected[:2])


def test_each_row_gets_as_many_alternatives_as_it_asks_for() -> None:
    logits = torch.randn(4, 10)
    results = sample(logits, [ask(logprobs=count) for count in (0, None, 3, 20)])
    counts = [None if result.logprobs is None else len(result.logprobs.top) for result in results]
    assert counts == [0, None, 3, 10]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 3] = value
    logits[2, 4] = 2.0
    samples = [ask(temperature=0.0, logit_bias={1: 1.0}), ask(logprobs=1), ask(temperature=0.0, logprobs=1)]
    first, broken, last = sample(logits, samples)
    assert (first.token_id, first.error) == (1, "")
    assert broken.error == sampler.NOT_FINITE
    assert broken.logprobs is None
    assert (last.token_id, last.error) == (4, "")


def test_a_token_that_the_model_itself_excludes_is_no_error() -> None:
    assert one([-math.inf, 0.0], ask(temperature=0.0)).error == ""


def test_a_seeded_draw_is_the_same_in_any_batch() -> None:
    logits = torch.randn(24, 3000, generator=torch.Generator().manual_seed(1))
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_k": 2000, "top_p": 0.99},
        {"min_p": 0.02, "temperature": 1.7},
        {"temperature": 0.0},
    ]
    samples = [ask(seed=i, index=i % 5, **kinds[i % len(kinds)]) for i in range(24)]
    together = [result.token_id for result in sample(logits, samples)]
    alone = [one(row, s).token_id for row, s in zip(logits, samples, strict=True)]
    assert together == alone


def test_ties_at_the_edge_stay_whatever_else_is_in_the_batch() -> None:
    logits = torch.zeros(2, 3000)
    narrow = [one(logits[0], ask(seed=seed, top_k=3)).token_id for seed in range(20)]
    wide = [sample(logits, [ask(seed=seed, top_k=3), ask(top_k=2900)])[0].token_id for seed in range(20)]
    assert narrow == wide
    assert len(set(narrow)) > 3


def test_seeds_and_indices_make_different_draws() -> None:
    points = {uniform(seed, index) for seed in range(-20, 20) for index in range(20)}
    assert len(points) == 800
    assert all(0 <= point < 1 for point in points)
    assert sum(points) / 800 == pytest.approx(0.5, abs=0.05)


def test_sixteen_bit_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(1, 100).bfloat16()
    result = sample(logits, [ask(temperature=0.0, logprobs=0)])[0]
    assert result.logprobs is not None
    assert result.logprobs.chosen == pytest.approx(float(torch.log_softmax(logits.float(), -1).max()))


def test_nothing_to_sample_is_fine() -> None:
    assert sample(torch.zeros(0, 5), []) == []


EVERY_WAY = [
    {"temperature": 0.0},
    {"temperature": 0.7, "logprobs": 2},
    {"top_k": 5},
    {"top_p": 0.9, "logprobs": 0},
    {"top_k": 2000, "top_p": 0.99},
    {"min_p": 0.02, "top_p": 0.999},
    {"logit_bias": {3: 2.0}, "banned_ids": (4,)},
]


def test_what_a_choice_is_made_of_goes_to_the_device_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "draw", lambda logits, **_: torch.empty_like(logits[:, 0], dtype=torch.int64))
    # Tensors without content: whoever reads a value fails.
    logits = torch.empty(len(EVERY_WAY), 3000, device="meta")
    choices = sampler.launch(logits, [ask(seed=i, **kind) for i, kind in enumerate(EVERY_WAY)])
    assert choices.tokens.shape == (len(EVERY_WAY),)
    with pytest.raises(RuntimeError, match="meta"):
        choices.result()


@pytest.mark.gpu
def test_a_gpu_chooses_what_a_cpu_chooses_and_never_waits() -> None:
    logits = torch.randn(35, 3000, generator=torch.Generator().manual_seed(5)).bfloat16()
    samples = [ask(seed=i, **EVERY_WAY[i % len(EVERY_WAY)]) for i in range(35)]
    on_device = logits.cuda()
    sample(on_device, samples)  # compiles
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            choices = sampler.launch(on_device, samples)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = [each.token_id for each in sample(logits, samples)]
    assert [each.token_id for each in choices.result()] == expected


def test_logits_may_be_written_again_once_the_choice_is_launched() -> None:
    logits = torch.randn(len(EVERY_WAY), 3000, generator=torch.Generator().manual_seed(2))
    samples = [ask(seed=i, **kind) for i, kind in enumerate(EVERY_WAY)]
    for some in (samples, samples[:1], samples[3:4], samples[5:6]):
        memory = logits[: len(some)].clone()
        expected = sample(memory, some)
        choices = sampler.launch(memory, some)
        memory.fill_(math.nan)
        assert choices.result() == expected


def test_the_device_has_the_tokens_that_are_told_but_for_those_missing() -> None:
    logits = torch.randn(24, 3000, generator=torch.Generator().manual_seed(3))
    logits[7, 5] = math.nan
    samples = [ask(seed=i, **EVERY_WAY[i % len(EVERY_WAY)]) for i in range(24)]
    choices = sampler.launch(logits, samples)
    results = choices.result()
    assert results[7].error
    for on_device, told in zip(choices.tokens.tolist(), results, strict=True):
        assert (on_device < 0) == bool(told.error)
        assert on_device < 0 or on_device == told.token_id


def test_what_is_not_finite_is_noticed_where_it_is_banned() -> None:
    assert one([0.0, math.nan, 1.0], ask(banned_ids=(1,))).error == sampler.NOT_FINITE


def test_whole_distributions_are_given_to_rows_that_ask_for_them_alone() -> None:
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    samples = [ask(), ask(logprobs=0), ask(logprobs=2), ask(logprobs=0), ask()]
    samples[2], samples[3] = (replace(samples[i], all_logprobs=True) for i in (2, 3))
    results = sample(logits, samples)
    assert [bool(result.logprobs and result.logprobs.every) for result in results] == [
        False,
        False,
        True,
        True,
        False,
    ]
    for i in (2, 3):
        logprobs = results[i].logprobs
        assert logprobs is not None
        whole = torch.frombuffer(bytearray(logprobs.every), dtype=torch.float32)
        torch.testing.assert_close(whole, torch.log_softmax(logits[i], dim=-1))
        assert logprobs.chosen == whole[results[i].token_id]
    assert results[2].logprobs is not None
    assert len(results[2].logprobs.top) == 2
