"""A real model under grammars: outputs follow them, whatever else is asked for, and rows beside do not change."""

import json
import re
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_api.params import SamplingParams
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import AddRequest, Finish, Output, TextPart
from softprompt_inference.engine.plan import Sample
from softprompt_inference.engine.seen import Seen
from softprompt_inference.model import sampler
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import ChatMessage, Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "is_capital": {"type": "boolean"},
        "river": {"enum": ["Seine", "Thames", None]},
    },
    "required": ["city", "population", "is_capital", "river"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA)
REGEX = StructuredOutputsParams(regex=r"[A-Z][a-z]{2,6}, \d{4}")
CHOICE = StructuredOutputsParams(choice=["Paris", "Paris is nice", "London"])
LARK = StructuredOutputsParams(grammar='start: WORD (" " WORD){1,4} "."\nWORD: /[a-z]{1,6}/')
EVERY_FORM = {"json": JSON, "regex": REGEX, "choice": CHOICE, "lark": LARK}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def runner(lab: Any) -> Any:
    """The real model, which has opinions."""
    return lab.runner(resolve_model(DEFAULT_MODEL), kv_cache_bytes=64 * 2**20, max_model_len=512)


@pytest.fixture(scope="module")
def random_runner(lab: Any, tiny_model: Path) -> Any:
    """A model that writes nonsense, with the real tokenizer."""
    return lab.runner(tiny_model, max_model_len=512)


def engine_over(runner: Any, **settings: Any) -> Engine:
    return Engine(runner, EngineConfig(model_path="", max_model_len=512, **settings))


def request(
    tokenizer: Tokenizer, name: str, params: SamplingParams, *, text: str = "Tell me about Paris.", seed: int = 0
) -> AddRequest:
    [prompt] = tokenizer.encode_chat([ChatMessage(role="user", content=text)])
    assert isinstance(prompt, list)
    eos = list(tokenizer.eos_token_ids)
    return AddRequest(
        request_id=name, prompt=[TextPart(token_ids=prompt)], params=params, eos_token_ids=eos, seed=seed
    )


def serve(engine: Engine, requests: list[AddRequest]) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {one.request_id: [] for one in requests}
    for one in requests:
        engine.handle(one)
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error_message
            outputs[output.request_id].append(output)
        engine.check()
    return outputs


def text_of(tokenizer: Tokenizer, outputs: list[Output]) -> str:
    ids = [output.token_id for output in outputs if output.token_id is not None]
    return tokenizer.decode(ids, skip_special_tokens=True)


def assert_in_form(name: str, text: str) -> None:
    if name == "json":
        value = json.loads(text)
        assert list(value) == ["city", "population", "is_capital", "river"]
        assert len(value["city"]) <= 12
        assert 0 <= value["population"] <= 99_999_999
        assert type(value["population"]) is int
        assert type(value["is_capital"]) is bool
        assert value["river"] in ("Seine", "Thames", None)
    elif name == "regex":
        assert re.fullmatch(r"[A-Z][a-z]{2,6}, \d{4}", text)
    elif name == "choice":
        assert text in ("Paris", "Paris is nice", "London")
    else:
        assert re.fullmatch(r"[a-z]{1,6}( [a-z]{1,6}){1,4}\.", text)


WAYS = {
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 2.0},
    "cut": {"temperature": 1.3, "top_p": 0.9, "top_k": 7, "min_p": 0.01},
    "penalised": {
        "temperature": 1.0,
        "repetition_penalty": 1.9,
        "frequency_penalty": 2.0,
        "presence_penalty": 2.0,
    },
    "biased": {"temperature": 1.0, "logit_bias": {28: 100.0, 30: -100.0, 2: 100.0}},
    "with logprobs": {"temperature": 1.0, "logprobs": 5},
    "no end": {"temperature": 1.0, "ignore_eos": True},
    "no short end": {"temperature": 1.0, "min_tokens": 30},
}


def formed(tokenizer: Tokenizer, **sampling: Any) -> list[AddRequest]:
    """A request for each form, named by it."""
    return [
        request(tokenizer, name, SamplingParams(max_tokens=300, structured_outputs=form, **sampling), seed=number)
        for number, (name, form) in enumerate(EVERY_FORM.items())
    ]


def assert_all_in_form(tokenizer: Tokenizer, served: dict[str, list[Output]]) -> None:
    for name, outputs in served.items():
        assert outputs[-1].finish is Finish.STOP, text_of(tokenizer, outputs)
        assert_in_form(name, text_of(tokenizer, outputs))


@pytest.mark.parametrize("way", WAYS)
def test_every_output_follows_its_form(random_runner: Any, tokenizer: Tokenizer, way: str) -> None:
    assert_all_in_form(tokenizer, serve(engine_over(random_runner), formed(tokenizer, **WAYS[way])))


def assert_free_rows_are_not_changed(
    engine: Engine, tokenizer: Tokenizer, free: list[AddRequest], forms: list[AddRequest]
) -> None:
    """Free requests get what they get alone, beside others that follow their forms."""
    alone = {name: outputs for one in free for name, outputs in serve(engine, [one]).items()}
    beside = serve(engine, [*free[:1], *forms, *free[1:]])
    for name, outputs in alone.items():
        assert [output.token_id for output in beside.pop(name)] == [output.token_id for output in outputs]
    assert_all_in_form(tokenizer, beside)


TEXTS = ["Tell me about Paris.", "Count to ten.", "Why is the sky blue?"]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_free_rows_in_the_same_steps_are_what_they_are_alone(
    random_runner: Any, tokenizer: Tokenizer, look_ahead: bool
) -> None:
    free = [
        request(tokenizer, f"free-{number}", SamplingParams(temperature=temperature, max_tokens=40), text=text)
        for number, (text, temperature) in enumerate(zip(TEXTS, (0.0, 0.0, 1.0), strict=True))
    ]
    engine = engine_over(random_runner, look_ahead=look_ahead)
    assert_free_rows_are_not_changed(engine, tokenizer, free, formed(tokenizer, temperature=1.0))


def test_the_real_model_follows_forms_beside_free_rows(runner: Any, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    free = [request(tokenizer, f"free-{number}", params, text=text) for number, text in enumerate(TEXTS[:2])]
    forms = formed(tokenizer, temperature=0.0)
    assert_free_rows_are_not_changed(engine_over(runner), tokenizer, free, forms)


def test_choices_of_one_prompt_go_their_own_ways_and_seeds_repeat(
    random_runner: Any, tokenizer: Tokenizer
) -> None:
    engine = engine_over(random_runner)
    params = SamplingParams(temperature=1.5, max_tokens=300, structured_outputs=JSON)
    requests = [request(tokenizer, str(seed), params, seed=seed) for seed in range(4)]
    first = {name: text_of(tokenizer, outputs) for name, outputs in serve(engine, requests).items()}
    again = {name: text_of(tokenizer, outputs) for name, outputs in serve(engine, requests).items()}
    assert first == again
    assert len(set(first.values())) > 1
    for text in first.values():
        assert_in_form("json", text)


def test_logprobs_are_the_models_own_not_the_grammars(runner: Any, tokenizer: Tokenizer) -> None:
    """A token that the model finds unlikely is told to be so, though nothing else may come."""
    form = StructuredOutputsParams(choice=["zzzzqqqq"])
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=3, structured_outputs=form)
    [outputs] = serve(engine_over(runner), [request(tokenizer, "a", params)]).values()
    first = outputs[0].logprobs
    assert first is not None
    assert first.chosen < -5
    assert outputs[0].token_id not in [token_id for token_id, _ in first.top]


def test_a_preempted_output_goes_on_in_its_grammar(lab: Any, tiny_model: Path, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=200, structured_outputs=JSON)
    requests = [request(tokenizer, str(seed), params, seed=seed) for seed in range(6)]

    def run(num_tokens: int) -> tuple[dict[str, str], int]:
        # Two layers, keys and values, of two heads of 16 numbers each.
        kv_cache_bytes = num_tokens * 2 * 2 * 2 * 16 * 4
        engine = lab.engine(tiny_model, kv_cache_bytes=kv_cache_bytes, max_model_len=256)
        outputs = serve(engine, requests)
        return {name: text_of(tokenizer, one) for name, one in outputs.items()}, engine.step().stats.preemptions

    roomy, none = run(4096)
    tight, some = run(272)
    assert (none, some > 0) == (0, True)
    assert tight == roomy
    for text in tight.values():
        assert_in_form("json", text)


class Only:
    """A grammar of some tokens."""

    error = ""

    def __init__(self, vocab_size: int, *token_ids: int) -> None:
        mask = bytearray(4 * -(-vocab_size // 32))
        for token_id in token_ids:
            mask[token_id >> 3] |= 1 << (token_id & 7)
        self._mask = bytes(mask)

    def allowed(self, banned_ids: Any) -> bytes:
        return self._mask

    def accept(self, token_id: int) -> None:
        raise AssertionError("the sampler does not go on by itself")


def sample_of(**changes: Any) -> Sample:
    plain = Sample(params=SamplingParams(temperature=0.0), seed=0, index=0)
    return replace(plain, **changes)


def test_a_mask_is_for_its_row_alone() -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    allowed = [token_id for token_id in (0, 31, 32, 63, 69) if token_id != best[1]]
    samples = [sample_of(), sample_of(matcher=Only(70, *allowed)), sample_of()]
    chosen = [one.token_id for one in sampler.sample(logits, samples)]
    assert [chosen[0], chosen[2]] == [best[0], best[2]]
    assert chosen[1] == max(allowed, key=lambda token_id: float(logits[1, token_id]))


def test_a_bias_cannot_bring_back_what_is_not_allowed() -> None:
    logits = torch.zeros(1, 70)
    params = SamplingParams(temperature=0.0, logit_bias={5: 100.0}, repetition_penalty=1.5)
    [one] = sampler.sample(logits, [sample_of(params=params, matcher=Only(70, 7), seen=Seen([], [7]))])
    assert one.token_id == 7


def test_what_is_not_finite_is_an_error_behind_a_mask_too() -> None:
    logits = torch.zeros(1, 70)
    logits[0, 3] = float("nan")
    [one] = sampler.sample(logits, [sample_of(matcher=Only(70, 7))])
    assert one.error == sampler.NOT_FINITE


def test_a_runner_compiles_in_another_thread(runner: Any) -> None:
    future = runner.compile(REGEX)
    assert isinstance(future, Future)
    assert any(future.result(60).allowed(()))
