"""Requests with a grammar: they wait for it beside all others, follow it, and change nobody."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.params import SamplingParams
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.engine.messages import Abort, AddRequest, DropAdapter, Finish
from softprompt_inference.engine.plan import Matcher

VOCAB_SIZE = 50
EOS = 49


@dataclass
class Script:
    """A grammar whose n-th token is one of the n-th list, and then the end."""

    steps: list[list[int]]
    error: str = ""
    breaks_at: int = -1
    accepted: list[int] = field(default_factory=list)

    def allowed(self, banned_ids: Sequence[int]) -> bytes:
        if len(self.accepted) == self.breaks_at:
            self.error = "the grammar is too complex"
            return bytes(8)
        now = self.steps[len(self.accepted)] if len(self.accepted) < len(self.steps) else [EOS]
        return pack(set(now) - set(banned_ids) or now)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def pack(ids: Any) -> bytes:
    return sum(1 << token_id for token_id in ids).to_bytes(8, "little")


def done(matcher: Matcher) -> Future[Matcher]:
    future: Future[Matcher] = Future()
    future.set_result(matcher)
    return future


def constrained(fakes: Any, name: str, *, seed: int = 5, **changes: Any) -> AddRequest:
    params = SamplingParams(
        **{"max_tokens": 10, "structured_outputs": StructuredOutputsParams(regex="x"), **changes}
    )
    request: AddRequest = fakes.request(name, [1, 2, 3], params=params, eos=[EOS], seed=seed)
    return request


def ids(outputs: Any) -> list[int]:
    return [output.token_id for output in outputs]


STEPS = [[3, 4], [5], [6, 7, 8]]


def test_an_output_follows_its_grammar_and_ends_with_it(fakes: Any) -> None:
    runner = fakes.runner()
    runner.matchers = [done(script := Script(STEPS))]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a"))
    outputs = fakes.drain(engine)["a"]
    assert all(token_id in step for token_id, step in zip(ids(outputs), [*STEPS, [EOS]], strict=True))
    assert outputs[-1].finish is Finish.STOP
    assert script.accepted == ids(outputs)
    assert runner.compiled == [StructuredOutputsParams(regex="x")]


def test_the_token_limit_ends_it_before(fakes: Any) -> None:
    runner = fakes.runner()
    runner.matchers = [done(Script(STEPS))]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a", max_tokens=2))
    outputs = fakes.drain(engine)["a"]
    assert (len(outputs), outputs[-1].finish) == (2, Finish.LENGTH)


@pytest.mark.parametrize("changes", [{"ignore_eos": True}, {"min_tokens": 3}, {"min_tokens": 9}])
def test_no_end_comes_early_and_none_too_late(fakes: Any, changes: Any) -> None:
    """An end that the grammar only allows is put off; where it has nothing else, it comes."""
    steps = [[3, EOS], [EOS, 5], [6]]
    runner = fakes.runner()
    runner.matchers = [done(Script(steps))]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a", **changes))
    outputs = fakes.drain(engine)["a"]
    assert ids(outputs) == [3, 5, 6, EOS]
    assert outputs[-1].finish is Finish.STOP


def test_others_do_not_wait_for_a_grammar(fakes: Any) -> None:
    runner = fakes.runner()
    compiling: Future[Matcher] = Future()
    runner.matchers = [compiling]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "slow"))
    free = fakes.request("free", [1, 2, 3], seed=1)
    engine.handle(free)
    outputs = {}
    while "free" not in outputs or outputs["free"][-1].finish is None:
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert ids(outputs["free"]) == fakes.solo(free)
    assert engine.has_work
    assert not engine.step().outputs
    compiling.set_result(Script(STEPS))
    assert len(fakes.drain(engine)["slow"]) == len(STEPS) + 1


@pytest.mark.parametrize("look_ahead", [False, True])
def test_nobody_beside_is_changed(fakes: Any, look_ahead: bool) -> None:
    runner = fakes.runner(num_pages=40)
    runner.matchers = [done(Script(STEPS)) for _ in range(3)]
    engine = fakes.engine(runner, look_ahead=look_ahead)
    others = [fakes.request(f"other-{seed}", [1] * 9, seed=seed, max_tokens=8) for seed in range(3)]
    for number, other in enumerate(others):
        engine.handle(other)
        engine.handle(constrained(fakes, f"own-{number}"))
    outputs = fakes.drain(engine)
    for other in others:
        assert ids(outputs[other.request_id]) == fakes.solo(other)
    alone = {tuple(ids(outputs[f"own-{number}"])) for number in range(3)}
    assert len(alone) == 1


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_preempted_output_goes_on_in_its_grammar(fakes: Any, look_ahead: bool) -> None:
    steps = [[number, number + 1] for number in range(1, 25, 2)]

    def run(num_pages: int) -> tuple[list[list[int]], int]:
        runner = fakes.runner(num_pages=num_pages)
        runner.matchers = [done(Script(steps)) for _ in range(4)]
        engine = fakes.engine(runner, look_ahead=look_ahead)
        for number in range(4):
            engine.handle(constrained(fakes, str(number), seed=number, max_tokens=20))
        outputs = fakes.drain(engine)
        return [ids(outputs[str(number)]) for number in range(4)], engine.step().stats.preemptions

    expected, none = run(64)
    actual, some = run(8)
    assert (none, some > 0) == (0, True)
    assert actual == expected
    assert all(output[-1] == EOS for output in expected)


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(fakes: Any) -> None:
    runner = fakes.runner()
    bad, broken = Future[Matcher](), Future[Matcher]()
    bad.set_exception(InvalidArgument("no grammar", field="structured_outputs"))
    broken.set_exception(RuntimeError("a defect"))
    runner.matchers = [bad, broken, done(Script(STEPS))]
    engine = fakes.engine(runner)
    for name in ("bad", "broken", "good"):
        engine.handle(constrained(fakes, name))
    outputs = fakes.drain(engine)
    [refused], [failed] = outputs["bad"], outputs["broken"]
    assert (refused.error_reason, refused.error_field) == ("INVALID_ARGUMENT", "structured_outputs")
    assert (failed.error_reason, failed.error_message) == ("INTERNAL", "the grammar could not be compiled")
    assert outputs["good"][-1].finish is Finish.STOP


def test_an_output_that_can_go_on_no_more_fails_alone(fakes: Any) -> None:
    runner = fakes.runner()
    runner.matchers = [done(Script(STEPS, breaks_at=2)), done(Script(STEPS))]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a"))
    engine.handle(constrained(fakes, "b"))
    outputs = fakes.drain(engine)
    last = outputs["a"][-1]
    assert (last.error_reason, last.error_message) == ("INVALID_ARGUMENT", "the grammar is too complex")
    assert outputs["b"][-1].finish is Finish.STOP


def test_an_output_that_can_go_on_no_more_leaves_what_it_computed(fakes: Any) -> None:
    runner = fakes.runner()
    runner.matchers = [done(Script(STEPS, breaks_at=2))]
    engine = fakes.engine(runner)
    engine.load_adapter(fakes.adapter("a", 10))
    asks = [fakes.request(name, "a", [1, 2, 3]) for name in "xyz"]
    engine.add(asks[0])
    fakes.drain(engine)
    engine.add(replace(asks[1], params=constrained(fakes, "y").params, eos_token_ids=[EOS]))
    assert fakes.drain(engine)["y"][-1].error_reason == "INVALID_ARGUMENT"
    engine.add(asks[2])
    assert fakes.drain(engine)["z"][0].cached_tokens == 12


def test_an_aborted_request_is_forgotten_while_it_waits(fakes: Any) -> None:
    runner = fakes.runner()
    compiling: Future[Matcher] = Future()
    runner.matchers = [compiling]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a"))
    assert engine.has_work
    engine.handle(Abort(request_id="a"))
    assert not engine.has_work
    assert compiling.cancelled()


def test_a_request_id_is_in_use_while_its_grammar_is_compiled(fakes: Any) -> None:
    runner = fakes.runner()
    runner.matchers = [Future(), Future()]
    engine = fakes.engine(runner)
    engine.handle(constrained(fakes, "a"))
    engine.handle(constrained(fakes, "a"))
    [output] = engine.step().outputs
    assert output.error_field == "request_id"


def test_an_adapter_stays_for_who_waits_for_a_grammar(fakes: Any) -> None:
    runner = fakes.runner()
    compiling: Future[Matcher] = Future()
    runner.matchers = [compiling]
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("soft", 3))
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="x"))
    engine.handle(fakes.request("a", "soft", [1, 2], params=params, eos=[EOS]))
    engine.handle(DropAdapter(digest="sha256:soft"))
    engine.step()
    assert not runner.dropped
    compiling.set_result(Script(STEPS))
    fakes.drain(engine)
    assert runner.dropped
