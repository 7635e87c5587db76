"""Sampling parameters: right ones pass, wrong ones are refused naming the field."""

import math

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.params import SamplingParams

NO_INTEGERS = [1.5, "16", True, None, math.nan, 2**70]
NO_NUMBERS = ["1", True, None, math.nan, math.inf, -math.inf]


def test_the_defaults_are_openais_and_vllms():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.n) == (16, 1.0, 1.0, 1)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_none_is_none_of_them_as_in_vllm():
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, 1, 2**31 - 1, None]),
        ("temperature", [0, 0.0, 2]),
        ("top_p", [1e-9, 1]),
        ("top_k", [-1, 0, 50]),
        ("min_p", [0, 1]),
        ("seed", [None, -(2**63), 2**63 - 1]),
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("repetition_penalty", [0.1, 2]),
        ("min_tokens", [0, 16]),
        ("logprobs", [None, 0, 20]),
        ("prompt_logprobs", [None, 0, 20]),
        ("n", [1, 128]),
        ("stop", [[], ["x" * 1024], ["x"] * 16]),
        ("stop_token_ids", [[0, 5]]),
        ("logit_bias", [{}, {5: -100, 6: 100.0}]),
    ],
)
def test_values_within_limits_are_accepted(name, values):
    for value in values:
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [-1, 2**31, *(value for value in NO_INTEGERS if value is not None)]),
        ("temperature", [-0.1, 2.1, *NO_NUMBERS]),
        ("top_p", [0, -1, 1.1, *NO_NUMBERS]),
        ("top_k", [-2, *NO_INTEGERS]),
        ("min_p", [-0.1, 1.1, *NO_NUMBERS]),
        ("seed", [2**63, 1.5, "1", True]),
        ("presence_penalty", [-2.1, 2.1, *NO_NUMBERS]),
        ("frequency_penalty", [-2.1, 2.1, *NO_NUMBERS]),
        ("repetition_penalty", [0, -1, 2.1, *NO_NUMBERS]),
        ("min_tokens", [-1, 17, *NO_INTEGERS]),
        ("logprobs", [-1, 21, 1.5, "5", True]),
        ("prompt_logprobs", [-1, 21, 1.5, "5", True]),
        ("n", [0, -1, 129, *NO_INTEGERS]),
        ("ignore_eos", [1, 0, "true", None]),
        ("skip_special_tokens", ["no"]),
        ("stop", [[""], ["x" * 1025], ["x"] * 17, [1]]),
        ("stop_token_ids", [[-1], [True], ["1"], [0] * 257]),
        ("logit_bias", [{-1: 0}, {"5": 1}, {5: 101}, {5: math.nan}, {True: 1}, dict.fromkeys(range(1025), 0)]),
    ],
)
def test_values_beyond_limits_are_refused_naming_the_field(name, values):
    for value in values:
        with pytest.raises(InvalidArgument) as refused:
            SamplingParams(**{name: value})
        assert refused.value.field == name


def test_of_several_choices_the_first_tells_of_the_prompt():
    params = SamplingParams(n=2, prompt_logprobs=3)
    assert params.of_choice(0) is params
    assert params.of_choice(1) == SamplingParams(n=2)
    plain = SamplingParams(n=2)
    assert plain.of_choice(1) is plain


def test_ids_beyond_the_vocabulary_are_refused():
    SamplingParams(stop_token_ids=[99], logit_bias={99: 1}).check_vocabulary(100)
    for name, value in (("stop_token_ids", [100]), ("logit_bias", {100: 1})):
        with pytest.raises(InvalidArgument, match="ends at 99") as refused:
            SamplingParams(**{name: value}).check_vocabulary(100)
        assert refused.value.field == name
