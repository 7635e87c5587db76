"""Whatever else runs, every request gets exactly what it would get alone, or an error that names the reason."""

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from softprompt_api.errors import AdapterInvalid
from softprompt_api.params import SamplingParams
from softprompt_inference.engine import scheduler
from softprompt_inference.engine import sequence as sequence_module
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import MAX_FAILED_STEPS, Engine, EngineBroken
from softprompt_inference.engine.keys import page_key
from softprompt_inference.engine.messages import (
    Abort,
    AddRequest,
    DropAdapter,
    Finish,
    LoadAdapter,
    Output,
    SoftPromptPart,
    TextPart,
)
from softprompt_inference.engine.plan import Sampled


def ids(outputs: list[Output]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]


ADAPTER_LENGTHS = {"a": 3, "b": 4, "c": 4, "d": 9}
KEY_VALUE_LENGTHS = {"k": 3, "l": 8, "m": 10}
LENGTHS = {**ADAPTER_LENGTHS, **KEY_VALUE_LENGTHS}
LORAS = ("x", "y")


def make_adapters(fakes) -> list[LoadAdapter]:
    return [
        fakes.adapter(name, length, are_key_values=name in KEY_VALUE_LENGTHS) for name, length in LENGTHS.items()
    ]


@st.composite
def requests(draw: st.DrawFn, index: int) -> AddRequest:
    # Few ids and few prefixes, so that prompts often share pages.
    parts: list[TextPart | SoftPromptPart] = [
        SoftPromptPart(digest=f"sha256:{name}")
        for name in draw(st.lists(st.sampled_from(sorted(ADAPTER_LENGTHS)), max_size=2))
    ]
    text = draw(st.sampled_from([[1] * 14, [1] * 8, [1, 2, 3], [2]]))
    parts.append(TextPart(token_ids=text[: draw(st.integers(1, len(text)))]))
    if draw(st.booleans()):
        parts.reverse()
    if len(parts) > 1 and draw(st.integers(0, 4)) == 0:
        parts.remove(next(part for part in parts if isinstance(part, TextPart)))
    if name := draw(st.sampled_from(["", "", *KEY_VALUE_LENGTHS])):
        parts.insert(0, SoftPromptPart(digest=f"sha256:{name}"))
    length = sum(len(part.token_ids) if isinstance(part, TextPart) else LENGTHS[part.digest[-1]] for part in parts)
    room = 48 - length
    max_tokens = draw(st.one_of(st.none(), st.integers(0, room)))
    params = SamplingParams(
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.5])),
        max_tokens=max_tokens,
        min_tokens=0 if max_tokens == 0 else draw(st.sampled_from([0, 0, 1])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        stop_token_ids=draw(st.lists(st.integers(0, 49), max_size=3)),
        ignore_eos=draw(st.booleans()),
    )
    return AddRequest(
        request_id=str(index),
        prompt=parts,
        params=params,
        eos_token_ids=draw(st.lists(st.integers(0, 49), max_size=2)),
        seed=draw(st.integers(0, 3)),
        salt=draw(st.sampled_from(["", "", "tenant"])),
        lora=draw(st.sampled_from(["", "", *(f"sha256:{name}" for name in LORAS)])),
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_output_equals_the_solo_output_under_any_load(fakes, data: st.DataObject) -> None:
    most_scores = data.draw(st.sampled_from([1, 3, 128]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "MAX_SCORES", most_scores)
        _serve_any_load(fakes, data, most_scores)


def _serve_any_load(fakes, data: st.DataObject, most_scores: int) -> None:
    runner = fakes.runner(num_pages=data.draw(st.integers(12, 24)), page_size=4, max_model_len=48)
    engine = fakes.engine(
        runner,
        max_num_sequences=data.draw(st.integers(1, 6)),
        max_step_tokens=data.draw(st.integers(1, 24)),
        enable_prefix_caching=data.draw(st.sampled_from([True, True, True, False])),
        share=data.draw(st.sampled_from([True, True, True, False])),
        look_ahead=data.draw(st.booleans()),
    )
    adapters = make_adapters(fakes)
    loras = [fakes.lora(name) for name in LORAS]
    for command in (*adapters, *loras):
        engine.handle(command)
    sent: dict[str, AddRequest] = {}
    aborted: set[str] = set()
    outputs: dict[str, list[Output]] = {}
    for index in range(data.draw(st.integers(1, 12))):
        request = data.draw(requests(index))
        sent[request.request_id] = request
        engine.handle(request)
        engine.check()
        for _ in range(data.draw(st.integers(0, 4))):
            for output in engine.step().outputs:
                outputs.setdefault(output.request_id, []).append(output)
            engine.check()
        if data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.sampled_from(sorted(sent)))
            engine.handle(Abort(request_id=victim))
            aborted.add(victim)
            engine.check()
        if data.draw(st.integers(0, 4)) == 0:
            # Its virtual ids change when nobody uses it, and what they stand for does not.
            adapter = data.draw(st.sampled_from(adapters))
            engine.handle(DropAdapter(digest=adapter.digest))
            engine.handle(adapter)
            engine.check()
        if data.draw(st.integers(0, 4)) == 0:
            # Their slots change when nobody uses them.
            for lora in data.draw(st.permutations(loras)):
                engine.handle(DropAdapter(digest=lora.digest))
            for lora in data.draw(st.permutations(loras)):
                engine.handle(lora)
            engine.check()
    for request_id, rest in fakes.drain(engine).items():
        outputs.setdefault(request_id, []).extend(rest)
    for request_id, request in sent.items():
        expected = fakes.solo(request, adapters, max_model_len=48)
        got = outputs.get(request_id, [])
        if request_id in aborted:
            assert ids(got) == expected[: len(ids(got))]
            continue
        assert ids(got) == expected
        told = [output for output in got if output.prompt_logprobs is not None]
        assert got[: len(told)] == told, "the prompt is told first"
        scores = [] if request.params.prompt_logprobs is None else fakes.scores(request, adapters)
        assert [score for output in told for score in output.prompt_logprobs or ()] == scores
        rest = got[len(told) :]
        assert [output.finish is not None for output in rest] == [False] * (len(rest) - 1) + [True]
        assert [output.cached_tokens is not None for output in rest] == [True] + [False] * (len(rest) - 1)
    for plan in runner.plans:
        assert sum(len(chunk.scores.rows) for chunk in plan.chunks if chunk.scores) <= most_scores
    stats = engine.step().stats
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_steps_that_fail_end_their_requests_and_never_spoil_another(fakes, data: st.DataObject) -> None:
    runner = fakes.runner(num_pages=12, max_model_len=48)
    engine = fakes.engine(runner, look_ahead=data.draw(st.booleans()))
    adapters = make_adapters(fakes)
    loras = [fakes.lora(name) for name in LORAS]
    for command in (*adapters, *loras):
        engine.handle(command)
    sent = [data.draw(requests(index)) for index in range(data.draw(st.integers(1, 8)))]
    num_failures = MAX_FAILED_STEPS - 1
    outputs: dict[str, list[Output]] = {}
    for request in sent:
        engine.handle(request)
        kind = data.draw(st.sampled_from(["", "failures", "late_failures"]))
        if kind and num_failures:
            setattr(runner, kind, 1)
            num_failures -= 1
        for _ in range(data.draw(st.integers(0, 5))):
            for output in engine.step().outputs:
                outputs.setdefault(output.request_id, []).append(output)
            engine.check()
    runner.failures = runner.late_failures = 0
    for request_id, rest in fakes.drain(engine).items():
        outputs.setdefault(request_id, []).extend(rest)
    for request in sent:
        expected, got = fakes.solo(request, adapters, max_model_len=48), outputs[request.request_id]
        assert [output.finish is not None for output in got] == [False] * (len(got) - 1) + [True]
        if got[-1].error_reason:
            assert ids(got) == expected[: len(ids(got))]
        else:
            assert ids(got) == expected
    stats = engine.step().stats
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_with_room_for_all_exactly_what_nobody_has_computed_is_computed(fakes, data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([1, 3, 4, 8]))
    # Eight sequences of 48 tokens have less. Each page is looked at after each step.
    runner = fakes.runner(num_pages=500, page_size=page_size, max_model_len=48)
    engine = fakes.engine(runner, max_step_tokens=data.draw(st.integers(1, 24)))
    adapters = make_adapters(fakes)
    loras = [fakes.lora(name) for name in LORAS]
    for command in (*adapters, *loras):
        engine.handle(command)
    known: set[tuple[object, ...]] = set()
    for index in range(data.draw(st.integers(1, 8))):
        request = data.draw(requests(index))
        prompt: list[object] = []
        ends = []
        for part in request.prompt:
            if isinstance(part, TextPart):
                prompt += part.token_ids
            else:
                prompt += [(part.digest, row) for row in range(LENGTHS[part.digest[-1]])]
                ends.append(len(prompt))
        num_given = KEY_VALUE_LENGTHS.get(getattr(request.prompt[0], "digest", "")[-1:], 0)

        def beginning(
            positions: list[object], end: int, request=request, num_given=num_given
        ) -> tuple[object, ...]:
            # What an adapter gives is the same under every LoRA.
            return (request.salt, request.lora if end > num_given else "", *positions[:end])

        beginnings = [beginning(prompt, end) for end in range(len(prompt) + 1)]
        num_known = max((end for end, beginning in enumerate(beginnings) if beginning in known), default=0)
        # The positions whose logits are wanted are computed.
        wanted = [len(prompt) - 1]
        if request.params.prompt_logprobs is not None:
            texts = [position for position, each in enumerate(prompt) if isinstance(each, int)]
            wanted += [position - 1 for position in texts if position > num_given]
        num_known = min(num_known, *wanted)
        before = runner.computed_positions
        engine.handle(request)
        outputs = [each for each in fakes.drain(engine)[request.request_id] if each.prompt_logprobs is None]
        assert outputs[0].cached_tokens == num_known
        num_computed = len(prompt) - max(num_known, num_given) + len(outputs) - 1
        assert runner.computed_positions - before == num_computed
        computed = [*prompt, *ids(outputs)[:-1]]
        known |= {beginning(computed, end) for end in (*range(page_size, len(computed) + 1, page_size), *ends)}


def test_preempted_requests_lose_nothing(fakes) -> None:
    runner = fakes.runner(num_pages=8, page_size=4, max_model_len=32)
    engine = fakes.engine(runner, max_num_sequences=4)
    sent = [fakes.request(str(index), [index, 7], max_tokens=20, seed=index) for index in range(4)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    assert engine.step().stats.preemptions > 0
    for request in sent:
        assert ids(outputs[request.request_id]) == fakes.solo(request)


def test_the_oldest_finish_first_when_all_are_equal(fakes) -> None:
    engine = fakes.engine(fakes.runner(num_pages=8), max_num_sequences=4)
    for index in range(4):
        engine.handle(fakes.request(str(index), [index, 7], max_tokens=20))
    finished = []
    while engine.has_work:
        finished += [output.request_id for output in engine.step().outputs if output.finish]
    assert finished == ["0", "1", "2", "3"]


def test_adapters_of_equal_length_and_text_never_share_pages(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapters = [fakes.adapter("a", 8), fakes.adapter("b", 8)]
    for adapter in adapters:
        engine.handle(adapter)
    sent = [fakes.request(name, name, [1, 2, 3]) for name in "ab"]
    for request in sent:
        engine.handle(request)
        outputs = fakes.drain(engine)[request.request_id]
        assert outputs[0].cached_tokens == 0
        assert ids(outputs) == fakes.solo(request, adapters)


def test_the_same_adapter_and_text_are_computed_once(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 8))
    engine.handle(fakes.request("first", "a", [1, 2, 3], max_tokens=1))
    fakes.drain(engine)
    before = runner.computed_positions
    engine.handle(fakes.request("second", "a", [1, 2, 3], max_tokens=1))
    outputs = fakes.drain(engine)["second"]
    assert outputs[0].cached_tokens == 8
    assert runner.computed_positions - before == 3


@pytest.mark.parametrize("num_virtual_tokens", [3, 4, 6, 8, 12])
def test_a_warm_adapter_adds_no_position_to_a_request(fakes, num_virtual_tokens: int) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapter = fakes.adapter("a", num_virtual_tokens)
    engine.handle(adapter)
    engine.handle(fakes.request("0", "a", [1], max_tokens=2))
    fakes.drain(engine)
    runner.plans.clear()
    sent = [fakes.request(str(index), "a", [index] * index, max_tokens=1) for index in range(1, 5)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    assert sorted(runner.computed_ids) == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    for request in sent:
        assert ids(outputs[request.request_id]) == fakes.solo(request, [adapter])
        assert outputs[request.request_id][0].cached_tokens == num_virtual_tokens


def test_two_warm_adapters_of_one_length_give_each_request_its_own_rows(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapters = [fakes.adapter(name, 6) for name in "ab"]
    for adapter in adapters:
        engine.handle(adapter)
    for round_ in range(2):
        sent = [fakes.request(f"{round_}{name}", name, [7, round_]) for name in "abab"[round_ : round_ + 2]]
        for request in sent:
            engine.handle(request)
        outputs = fakes.drain(engine)
        for request in sent:
            assert ids(outputs[request.request_id]) == fakes.solo(request, adapters)
            assert outputs[request.request_id][0].cached_tokens == 6 * round_
    assert runner.copied_positions == 2 * 2


def test_the_partial_page_of_an_adapter_that_is_loaded_again_is_found_again(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapter = fakes.adapter("a", 6)
    for index, num_computed in enumerate((8, 2)):
        engine.handle(adapter)
        before = runner.computed_positions
        request = fakes.request(str(index), "a", [index, 1], max_tokens=1)
        engine.handle(request)
        assert ids(fakes.drain(engine)[str(index)]) == fakes.solo(request, [adapter])
        assert runner.computed_positions - before == num_computed
        engine.handle(DropAdapter(digest=adapter.digest))


def test_an_adapter_that_is_loaded_again_finds_its_pages_again(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    adapter = fakes.adapter("a", 8)
    for request_id, cached in (("first", 0), ("second", 8)):
        engine.handle(adapter)
        engine.handle(fakes.request(request_id, "a", [1]))
        assert fakes.drain(engine)[request_id][0].cached_tokens == cached
        engine.handle(DropAdapter(digest=adapter.digest))


def test_loras_keep_requests_apart(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    adapter = fakes.adapter("a", 6)
    for command in (adapter, fakes.lora("x"), fakes.lora("y")):
        engine.handle(command)
    for request_id, lora, cached in (("0", "x", 0), ("1", "y", 0), ("2", "", 0), ("3", "x", 8), ("4", "", 8)):
        request = fakes.request(request_id, "a", range(10), lora=lora)
        engine.handle(request)
        outputs = fakes.drain(engine)[request_id]
        assert ids(outputs) == fakes.solo(request, [adapter])
        assert outputs[0].cached_tokens >= cached
        assert (outputs[0].cached_tokens > 0) == (cached > 0)


@pytest.mark.parametrize("length", [3, 4, 6, 8])
def test_what_an_adapter_gives_is_shared_by_all_loras_and_what_follows_it_by_none(fakes, length: int) -> None:
    runner = fakes.runner(num_pages=64)
    engine = fakes.engine(runner)
    adapters = [fakes.adapter("k", length, are_key_values=True), fakes.adapter("a", 3)]
    for command in (*adapters, fakes.lora("x"), fakes.lora("y")):
        engine.handle(command)
    for number, lora in enumerate(["x", "y", "", "x"]):
        runner.written_positions = 0
        request = fakes.request(str(number), "k", "a", [1, 2], lora=lora, max_tokens=1)
        engine.handle(request)
        outputs = fakes.drain(engine)[str(number)]
        assert ids(outputs) == fakes.solo(request, adapters)
        assert runner.written_positions == (0 if number else length)
        if number < 3:
            assert outputs[0].cached_tokens == (length if number else 0)
        else:
            assert outputs[0].cached_tokens >= length + 3


def test_soft_prompts_in_front_share_their_common_beginning_and_order_keeps_them_apart(fakes) -> None:
    engine = fakes.engine(fakes.runner(num_pages=64))
    adapters = [fakes.adapter("a", 3), fakes.adapter("b", 6)]
    for adapter in adapters:
        engine.handle(adapter)
    for number, (parts, cached) in enumerate(
        [
            (("a", "b", [1]), 0),
            (("a", [1], "b"), 3),
            (("b", "a", [1]), 0),
            (("a", "b", [2]), 9),
            (("b", [1]), 6),
            (([1], "a", [2], "b", [3]), 0),
            (([1], "a", [2], "b", [4]), 11),
        ]
    ):
        request = fakes.request(str(number), *parts)
        engine.handle(request)
        outputs = fakes.drain(engine)[str(number)]
        assert ids(outputs) == fakes.solo(request, adapters)
        assert outputs[0].cached_tokens == cached, parts


def test_a_lora_in_use_is_dropped_after_its_last_request_and_its_slot_given_to_the_next(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_loras=1)
    request = fakes.request("0", [1], lora="x", max_tokens=6)
    engine.handle(fakes.lora("x"))
    engine.handle(request)
    outputs = list(engine.step().outputs)
    engine.handle(DropAdapter(digest="sha256:x"))
    engine.check()
    assert runner.loras == {0: "sha256:x"}
    outputs += fakes.drain(engine)["0"]
    assert ids(outputs) == fakes.solo(request)
    assert runner.loras == {}
    assert engine.step().stats.resident_adapters == 0
    engine.handle(fakes.lora("y"))
    engine.handle(fakes.lora("y"))
    assert runner.loras == {0: "sha256:y"}
    assert engine.step().stats.resident_adapters == 1


def test_a_lora_beyond_the_last_slot_fails_the_requests_that_want_it(fakes) -> None:
    engine = fakes.engine(fakes.runner(), max_loras=1)
    for name in "xy":
        engine.handle(fakes.lora(name))
        engine.handle(fakes.request(name, [1], lora=name))
    outputs = fakes.drain(engine)
    assert len(outputs["x"]) == 4
    assert [output.error_reason for output in outputs["y"]] == ["OVERLOADED"]


def test_a_lora_that_is_not_loaded_is_not_found(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.adapter("a", 3))
    for request_id, lora in (("0", "never"), ("1", "a")):
        engine.handle(fakes.request(request_id, [1], lora=lora))
        [output] = fakes.drain(engine)[request_id]
        assert output.error_reason == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize(("error", "is_told"), [(MemoryError("no room"), True), (AdapterInvalid("not so"), False)])
def test_a_load_that_failed_for_a_reason_that_may_pass_is_told_once_also_where_nobody_needs_it(
    fakes, kind: str, error: Exception, is_told: bool
) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    runner.load_error = error
    engine.handle(fakes.adapter("a", 3) if kind == "adapter" else fakes.lora("a"))
    assert engine.has_work == is_told
    assert engine.step().failed_loads == (["sha256:a"] if is_told else [])
    assert not engine.has_work
    assert engine.step().failed_loads == []


def test_a_lora_that_the_model_refuses_is_told_to_its_requests_until_it_is_loaded_again(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_loras=1)
    runner.load_error = AdapterInvalid("no module layers.9.proj", field="tensors")
    engine.handle(fakes.lora("x"))
    for request_id in "01":
        engine.handle(fakes.request(request_id, [1], lora="x"))
        [output] = fakes.drain(engine)[request_id]
        assert (output.error_reason, output.error_message) == ("ADAPTER_INVALID", "no module layers.9.proj")
    runner.load_error = None
    engine.handle(fakes.lora("x"))
    engine.handle(fakes.request("2", [1], lora="x"))
    assert len(fakes.drain(engine)["2"]) == 4


def test_salts_keep_requests_apart(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    for request_id, salt, cached in (("0", "x", 0), ("1", "y", 0), ("2", "x", 8)):
        engine.handle(fakes.request(request_id, range(10), salt=salt))
        assert fakes.drain(engine)[request_id][0].cached_tokens == cached


def test_without_sharing_every_request_computes_its_soft_prompt_and_texts_share_all_the_same(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, share=False)
    adapter = fakes.adapter("a", 6)
    engine.handle(adapter)
    for round_ in range(2):
        for parts, num_computed in ((["a", range(10)], 2 * 16), ([range(10)], 10 + 2 if round_ == 0 else 2 * 2)):
            before = runner.computed_positions
            sent = [fakes.request(f"{round_}{i}", *parts, max_tokens=1) for i in range(2)]
            for request in sent:
                engine.handle(request)
            outputs = fakes.drain(engine)
            for request in sent:
                assert ids(outputs[request.request_id]) == fakes.solo(request, [adapter])
            assert runner.computed_positions - before == num_computed


def test_without_sharing_a_preempted_request_finds_its_own_pages(fakes) -> None:
    runner = fakes.runner(num_pages=8)
    engine = fakes.engine(runner, share=False)
    adapter = fakes.adapter("a", 8)
    engine.handle(adapter)
    sent = [fakes.request(str(i), "a", [i] * 4, max_tokens=12) for i in range(2)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    assert engine.step().stats.preemptions > 0
    for request in sent:
        assert ids(outputs[request.request_id]) == fakes.solo(request, [adapter])
    assert sum(token_id >= fakes.vocab_size for token_id in runner.computed_ids) == 2 * 8


def test_an_adapter_in_use_is_dropped_after_its_last_request(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapter = fakes.adapter("a", 3)
    request = fakes.request("0", "a", [1], max_tokens=6)
    engine.handle(adapter)
    engine.handle(request)
    outputs = list(engine.step().outputs)
    engine.handle(DropAdapter(digest=adapter.digest))
    engine.check()
    assert runner.dropped == []
    outputs += fakes.drain(engine)["0"]
    assert ids(outputs) == fakes.solo(request, [adapter])
    assert runner.dropped == [fakes.vocab_size]
    assert engine.step().stats.resident_adapters == 0


def test_loading_again_takes_back_a_drop(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapter = fakes.adapter("a", 3)
    engine.handle(adapter)
    engine.handle(fakes.request("0", "a", [1]))
    engine.handle(DropAdapter(digest=adapter.digest))
    engine.handle(adapter)
    fakes.drain(engine)
    assert runner.dropped == []
    assert engine.step().stats.resident_adapters == 1


def test_unused_adapters_are_dropped_at_once_and_unknown_drops_ignored(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 3))
    engine.handle(DropAdapter(digest="sha256:a"))
    engine.handle(DropAdapter(digest="sha256:never"))
    assert runner.dropped == [fakes.vocab_size]
    assert runner.rows == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_size": 5}, "hidden size is 4"),
        ({"num_virtual_tokens": 13}, "1 to 12 are allowed"),
        ({"num_virtual_tokens": 0}, "1 to 12 are allowed"),
        ({"rows": b"short"}, "5 bytes, not 48"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"are_key_values": True}, "the model's keys and values are 8"),
    ],
)
def test_rows_that_do_not_fit_the_model_fail_the_requests_that_want_them(fakes, change, message) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(replace(fakes.adapter("a", 3), **change))
    engine.handle(fakes.request("0", "a", [1]))
    [output] = fakes.drain(engine)["0"]
    assert output.error_reason == "ADAPTER_INVALID"
    assert message in output.error_message


def test_keys_and_values_for_a_model_that_cannot_take_them_fail_the_requests_that_want_them(fakes) -> None:
    runner = fakes.runner()
    runner.info = replace(runner.info, no_key_values="Fake has sliding-window layers")
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("k", 3, are_key_values=True))
    engine.handle(fakes.request("0", "k", [1]))
    [output] = fakes.drain(engine)["0"]
    assert output.error_reason == "ADAPTER_INVALID"
    assert "Fake has sliding-window layers" in output.error_message


@pytest.mark.parametrize("length", [3, 4, 6, 8, 12])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 16])
def test_given_keys_and_values_are_written_and_never_computed(fakes, length: int, max_step_tokens: int) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_step_tokens=max_step_tokens)
    adapter = fakes.adapter("k", length, are_key_values=True)
    engine.handle(adapter)
    first, second = (fakes.request(str(i), "k", [7 + i, 8, 9], max_tokens=1) for i in range(2))
    for request, num_written in ((first, length), (second, 0)):
        runner.written_positions = 0
        runner.plans.clear()
        engine.handle(request)
        outputs = fakes.drain(engine)[request.request_id]
        assert ids(outputs) == fakes.solo(request, [adapter])
        assert runner.computed_ids == request.prompt[1].token_ids
        assert runner.written_positions == num_written
        assert outputs[0].cached_tokens == length - num_written


def test_a_preempted_sequence_has_its_keys_and_values_given_again(fakes) -> None:
    runner = fakes.runner(num_pages=8)
    engine = fakes.engine(runner, enable_prefix_caching=False)
    adapter = fakes.adapter("k", 6, are_key_values=True)
    engine.handle(adapter)
    sent = [fakes.request(str(i), "k", [i], max_tokens=14) for i in range(3)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    assert engine.step().stats.preemptions > 0
    assert runner.written_positions > 3 * 6
    for request in sent:
        assert ids(outputs[request.request_id]) == fakes.solo(request, [adapter])


def test_an_adapter_that_the_device_refused_can_be_loaded_again(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    runner.load_error = MemoryError("no room")
    engine.handle(fakes.adapter("a", 3))
    engine.handle(fakes.request("0", "a", [1]))
    result = engine.step()
    [output] = result.outputs
    assert (output.error_reason, "no room" in output.error_message) == ("INTERNAL", False)
    assert result.failed_loads == ["sha256:a"]
    runner.load_error = None
    engine.handle(fakes.adapter("a", 3))
    engine.handle(fakes.request("1", "a", [1]))
    assert len(fakes.drain(engine)["1"]) == 4


@pytest.mark.parametrize(
    ("parts", "kwargs", "reason", "field", "message"),
    [
        (([],), {}, "INVALID_ARGUMENT", "prompt", "empty"),
        ((), {}, "INVALID_ARGUMENT", "prompt", "empty"),
        (([1, 50],), {}, "INVALID_ARGUMENT", "prompt", "id 50; the vocabulary has ids 0 to 49"),
        (([-1],), {}, "INVALID_ARGUMENT", "prompt", "id -1"),
        (([1],), {"eos": [50]}, "INVALID_ARGUMENT", "eos_token_ids", "id 50"),
        (([1],), {"params": SamplingParams(stop_token_ids=[51])}, "INVALID_ARGUMENT", "stop_token_ids", "51"),
        (([1],), {"params": SamplingParams(logit_bias={52: 1.0})}, "INVALID_ARGUMENT", "logit_bias", "52"),
        (("k",), {}, "INVALID_ARGUMENT", "prompt", "empty"),
        (([1], "k", [1]), {}, "INVALID_ARGUMENT", "prompt", "at the front of a prompt alone"),
        (("a", "k", [1]), {}, "INVALID_ARGUMENT", "prompt", "at the front of a prompt alone"),
        (("k", "k", [1]), {}, "INVALID_ARGUMENT", "prompt", "at the front of a prompt alone"),
        (("k", [1] * 27), {"max_tokens": 2}, "CONTEXT_LENGTH_EXCEEDED", "max_tokens", "4 virtual tokens"),
        (("unknown", [1]), {}, "ADAPTER_NOT_FOUND", "adapter", "sha256:unknown is not loaded"),
        (("a", [1] * 28), {"max_tokens": 2}, "CONTEXT_LENGTH_EXCEEDED", "max_tokens", "3 virtual tokens"),
        (("a", [1] * 29), {"max_tokens": None}, "CONTEXT_LENGTH_EXCEEDED", "prompt", "29 prompt tokens"),
    ],
)
def test_bad_requests_are_refused_with_field_and_reason(fakes, parts, kwargs, reason, field, message) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.adapter("a", 3))
    engine.handle(fakes.adapter("k", 4, are_key_values=True))
    engine.handle(fakes.request("bad", *parts, **kwargs))
    good = fakes.request("good", [1])
    engine.handle(good)
    outputs = fakes.drain(engine)
    [output] = outputs["bad"]
    assert (output.finish, output.error_reason, output.error_field) == (Finish.ERROR, reason, field)
    assert message in output.error_message
    assert ids(outputs["good"]) == fakes.solo(good)


def test_ids_of_loaded_virtual_tokens_cannot_be_named_in_text(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.adapter("a", 3))
    engine.handle(fakes.request("0", [fakes.vocab_size]))
    assert fakes.drain(engine)["0"][0].error_reason == "INVALID_ARGUMENT"


def test_a_request_id_in_use_is_refused(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1]))
    engine.handle(fakes.request("0", [2]))
    assert engine.step().outputs[0].error_field == "request_id"


def test_a_request_that_fills_the_context_exactly_is_served(fakes) -> None:
    engine = fakes.engine(fakes.runner(num_pages=8))
    request = fakes.request("0", [1] * 12, max_tokens=20)
    engine.handle(request)
    outputs = fakes.drain(engine)["0"]
    assert ids(outputs) == fakes.solo(request)
    assert (len(outputs), outputs[-1].finish) == (20, Finish.LENGTH)


def test_a_cache_smaller_than_one_sequence_stops_the_start(fakes) -> None:
    with pytest.raises(ValueError, match=r"room for 28 positions \(7 pages of 4\)"):
        fakes.engine(fakes.runner(num_pages=7))


def test_logits_that_are_not_finite_end_one_request_only(fakes) -> None:
    runner = fakes.runner()
    runner.broken_seed = 1
    engine = fakes.engine(runner)
    sent = [fakes.request(str(seed), [1, 2, 3, 4, 5], seed=seed) for seed in range(3)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    [failed] = outputs["1"]
    assert (failed.error_reason, failed.error_message) == ("INTERNAL", "the logits are not finite")
    for request in (sent[0], sent[2]):
        assert ids(outputs[request.request_id]) == fakes.solo(request)


def test_pages_of_a_failed_request_are_not_found_again(fakes) -> None:
    runner = fakes.runner()
    runner.broken_seed = 1
    engine = fakes.engine(runner, max_step_tokens=4)
    engine.handle(fakes.request("0", range(10), seed=1))
    fakes.drain(engine)
    engine.handle(fakes.request("1", range(10)))
    assert fakes.drain(engine)["1"][0].cached_tokens == 0


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_num_sequences=1)
    later = fakes.request("later", [2])
    engine.handle(fakes.request("now", [1]))
    engine.handle(later)
    runner.failures = 1
    outputs = fakes.drain(engine)
    assert outputs["now"][-1].error_reason == "INTERNAL"
    assert "fell over" not in outputs["now"][-1].error_message
    assert ids(outputs["later"]) == fakes.solo(later)


def test_steps_that_fail_again_and_again_end_the_engine(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_num_sequences=1)
    for index in range(4):
        engine.handle(fakes.request(str(index), [1]))
    runner.failures = 9
    engine.step()
    engine.step()
    with pytest.raises(EngineBroken):
        engine.step()


def test_failed_steps_between_good_ones_do_not_end_the_engine(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    for index in range(5):
        runner.failures = 1
        engine.handle(fakes.request(f"failed {index}", [1]))
        fakes.drain(engine)
        engine.handle(fakes.request(f"served {index}", [1]))
        assert len(fakes.drain(engine)[f"served {index}"]) == 4


def test_eos_ends_with_stop_and_is_the_last_token(fakes) -> None:
    free = fakes.request("0", [1], max_tokens=8)
    eos = fakes.solo(free)[2]
    engine = fakes.engine(fakes.runner())
    engine.handle(replace(free, eos_token_ids=[eos]))
    outputs = fakes.drain(engine)["0"]
    assert (ids(outputs)[-1], outputs[-1].finish, outputs[-1].stop_token_id) == (eos, Finish.STOP, None)
    assert len(outputs) <= 3


def test_a_stop_token_ends_with_its_id(fakes) -> None:
    stop = fakes.solo(fakes.request("0", [1], max_tokens=8))[2]
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1], params=SamplingParams(max_tokens=8, stop_token_ids=[stop])))
    last = fakes.drain(engine)["0"][-1]
    assert (last.finish, last.stop_token_id) == (Finish.STOP, stop)


def test_ignore_eos_goes_on_to_max_tokens(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1], eos=range(50), params=SamplingParams(max_tokens=5, ignore_eos=True)))
    outputs = fakes.drain(engine)["0"]
    assert (len(outputs), outputs[-1].finish) == (5, Finish.LENGTH)


def test_min_tokens_bans_every_end_until_then(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    params = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=range(25))
    engine.handle(fakes.request("0", [1], eos=range(20, 49), params=params))
    outputs = fakes.drain(engine)["0"]
    assert ids(outputs)[:3] == [49, 49, 49]
    assert ids(outputs) == fakes.solo(fakes.request("0", [1], eos=range(20, 49), params=params))


def test_without_max_tokens_output_goes_to_the_end_of_the_context(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1] * 5, max_tokens=None))
    outputs = fakes.drain(engine)["0"]
    assert (len(outputs), outputs[-1].finish) == (27, Finish.LENGTH)


def test_logprobs_come_with_the_token(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1], params=SamplingParams(max_tokens=1, logprobs=1)))
    [output] = fakes.drain(engine)["0"]
    assert output.logprobs is not None
    assert output.logprobs.top == [(output.token_id, -1.0)]


def test_an_abort_frees_the_pages_at_once(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.request("0", [1] * 10, max_tokens=20))
    assert engine.step().stats.used_pages == 3
    engine.handle(Abort(request_id="0"))
    engine.handle(Abort(request_id="0"))
    engine.check()
    assert not engine.has_work
    assert engine.step().stats.used_pages == 0


def test_stats_count_computed_and_cached_prompt_positions(fakes) -> None:
    engine = fakes.engine(fakes.runner())
    for request_id in ("0", "1"):
        engine.handle(fakes.request(request_id, range(10), max_tokens=3))
        fakes.drain(engine)
    stats = engine.step().stats
    assert stats.computed_prompt_tokens == 10 + 2
    assert stats.cached_prompt_tokens == 8
    assert stats.generated_tokens == 6
    assert stats.num_pages == 16


def test_an_idle_step_computes_nothing(fakes) -> None:
    runner = fakes.runner()
    assert fakes.engine(runner).step().outputs == []
    assert runner.plans == []


def test_looking_ahead_a_step_is_launched_before_the_tokens_of_the_one_before_are_known(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, look_ahead=True)
    sent = [fakes.request(str(index), [index], max_tokens=4) for index in range(2)]
    for request in sent:
        engine.handle(request)
    outputs = fakes.drain(engine)
    for request in sent:
        assert ids(outputs[request.request_id]) == fakes.solo(request)
    # The last is known to be the last.
    assert runner.events == ["launch", "follow", "result", "follow", "result", "follow", "result", "result"]


def test_not_looking_ahead_each_step_waits_for_the_one_before(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.request("0", [1], max_tokens=3))
    fakes.drain(engine)
    assert runner.events == ["launch", "result"] * 3


def test_every_step_returns_the_outputs_of_one_step_also_when_looking_ahead(fakes) -> None:
    engine = fakes.engine(fakes.runner(), look_ahead=True)
    engine.handle(fakes.request("0", [1], max_tokens=4))
    assert [len(engine.step().outputs) for _ in range(4)] == [1] * 4
    assert not engine.has_work


def test_what_was_computed_behind_an_unforeseen_end_is_dropped(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, look_ahead=True)
    free = fakes.request("0", [1], max_tokens=8)
    request = replace(free, eos_token_ids=[fakes.solo(free)[2]])
    engine.handle(request)
    outputs = fakes.drain(engine)["0"]
    assert ids(outputs) == fakes.solo(request)
    assert outputs[-1].finish is Finish.STOP
    assert runner.computed_positions == len(request.prompt[0].token_ids) + len(outputs)
    assert engine.step().stats.used_pages == 0
    assert runner.events[-1] == "result"


def test_penalties_wait_for_the_token_before(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, look_ahead=True)
    params = SamplingParams(max_tokens=6, presence_penalty=0.5)
    for request in (penalised := fakes.request("0", [1], params=params), fakes.request("1", [2])):
        engine.handle(request)
    assert ids(fakes.drain(engine)["0"]) == fakes.solo(penalised)
    assert "follow" not in runner.events


def test_a_newcomer_is_planned_as_soon_as_the_step_that_is_out_is_known(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, look_ahead=True)
    engine.handle(fakes.request("0", [1], max_tokens=20))
    engine.step()
    engine.handle(fakes.request("1", [2], max_tokens=20))
    assert [output.request_id for output in engine.step().outputs] == ["0"]
    assert [output.request_id for output in engine.step().outputs] == ["0", "1"]
    assert [output.request_id for output in engine.step().outputs] == ["0", "1"]
    assert runner.events == [
        "launch",
        "follow",
        "result",
        "result",
        "launch",
        "follow",
        "result",
        "follow",
        "result",
    ]


def test_pages_of_an_aborted_request_serve_another_while_a_step_still_writes_to_them(fakes) -> None:
    runner = fakes.runner(num_pages=8)
    engine = fakes.engine(runner, look_ahead=True)
    engine.handle(fakes.request("0", [1] * 25, max_tokens=7))
    engine.step()
    engine.step()
    assert runner.events[-2:] == ["follow", "result"]
    engine.handle(Abort(request_id="0"))
    engine.check()
    request = fakes.request("1", [2] * 25, max_tokens=7)
    engine.handle(request)
    assert ids(fakes.drain(engine)["1"]) == fakes.solo(request)
    assert set(runner.plans[0].chunks[0].page_ids) & set(runner.plans[-1].chunks[0].page_ids)


def test_an_adapter_may_go_and_another_come_while_a_step_is_out(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, look_ahead=True)
    first, second = fakes.adapter("a", 3), fakes.adapter("b", 3)
    engine.handle(first)
    engine.handle(fakes.request("0", "a", [1], max_tokens=20))
    engine.handle(other := fakes.request("other", [2], max_tokens=20))
    outputs = [*engine.step().outputs]
    engine.handle(Abort(request_id="0"))
    engine.handle(DropAdapter(digest=first.digest))
    assert runner.dropped == [fakes.vocab_size]
    engine.handle(second)
    engine.handle(newcomer := fakes.request("1", "b", [1]))
    engine.check()
    rest = fakes.drain(engine)
    assert ids(rest["1"]) == fakes.solo(newcomer, [second])
    assert ids([o for o in outputs if o.request_id == "other"] + rest["other"]) == fakes.solo(other)


@pytest.mark.parametrize("kind", ["failures", "late_failures"])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_failed_step_ends_the_one_that_follows_it_too(fakes, kind: str, num_steps: int) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner, max_num_sequences=2, look_ahead=True)
    for index in range(3):
        engine.handle(fakes.request(str(index), [index], max_tokens=8))
    for _ in range(num_steps):
        engine.step()
    setattr(runner, kind, 1)
    failed: list[Output] = []
    while not failed:
        failed = [output for output in engine.step().outputs if output.error_reason]
        engine.check()
    assert {output.request_id: output.error_reason for output in failed} == {"0": "INTERNAL", "1": "INTERNAL"}
    assert ids(fakes.drain(engine)["2"]) == fakes.solo(fakes.request("2", [2], max_tokens=8))


def test_look_ahead_is_for_devices_that_compute_while_the_host_works(fakes) -> None:
    for device, look_ahead, expected in [
        ("cpu", None, False),
        ("cuda:0", None, True),
        ("cpu", True, True),
        ("cuda:0", False, False),
    ]:
        runner = fakes.runner(device=device)
        engine = Engine(runner, EngineConfig(model_path="", look_ahead=look_ahead))
        engine.handle(fakes.request("0", [1]))
        fakes.drain(engine)
        assert ("follow" in runner.events) == expected


def test_the_host_part_of_a_decode_step_takes_well_under_a_millisecond(fakes, monkeypatch) -> None:
    runner = fakes.runner(num_pages=4096, page_size=16, max_model_len=2048)
    engine = fakes.engine(runner, max_num_sequences=32, max_step_tokens=4096)
    for index in range(32):
        engine.handle(fakes.request(str(index), [index] * 1000, max_tokens=500))
    tokens = [Sampled(token_id=3)] * 32
    monkeypatch.setattr(runner, "launch", lambda _: SimpleNamespace(result=lambda: tokens))
    fastest = float("inf")
    for _ in range(100):
        start = time.perf_counter()
        engine.step()
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1e-3


def test_load_adapter_is_idempotent(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    adapter: LoadAdapter = fakes.adapter("a", 3)
    engine.handle(adapter)
    engine.handle(adapter)
    assert sorted(runner.rows) == [50, 51, 52]


def test_the_engine_core_needs_no_wire_and_no_torch() -> None:
    script = (
        "import sys, softprompt_inference.engine.engine as _\n"
        "sys.exit(str({'torch', 'grpc', 'msgspec', 'redis', 'fastapi', 'structlog'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr == "set()\n"


def test_the_choices_of_one_request_share_what_is_hashed_of_their_prompt(fakes, monkeypatch) -> None:
    num_hashed = 0

    def hash_page(*args):
        nonlocal num_hashed
        num_hashed += 1
        return page_key(*args)

    monkeypatch.setattr(sequence_module, "page_key", hash_page)
    engine = fakes.engine(fakes.runner())
    requests = [fakes.request(f"0-{index}", range(17), seed=index, max_tokens=2) for index in range(6)]
    for request in requests:
        engine.handle(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step().outputs
        engine.check()
    assert num_hashed == 17 // 4
    for request in requests:
        tokens = [output.token_id for output in outputs if output.request_id == request.request_id]
        assert tokens == fakes.solo(request)
