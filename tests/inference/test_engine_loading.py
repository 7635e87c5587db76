"""Adapters that come in over several steps: LoRAs, and keys and values."""

from collections.abc import Sequence
from typing import Any

import pytest
from softprompt_api.errors import AdapterInvalid
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import AddRequest, Command, DropAdapter, StepResult


class Case:
    """An engine with room for few LoRAs, and adapters of one kind that come to it."""

    def __init__(self, fakes: Any, kind: str, max_loras: int) -> None:
        self.fakes = fakes
        self.is_lora = kind == "lora"
        self.runner = fakes.runner()
        self.engine: Engine = fakes.engine(self.runner, max_loras=max_loras)

    def load(self, name: str, *, pieces: int = 1) -> None:
        self.runner.key_value_pieces = pieces
        command: Command = (
            self.fakes.lora(name, pieces=pieces)
            if self.is_lora
            else self.fakes.adapter(name, 3, are_key_values=True)
        )
        self.engine.handle(command)

    def request(self, request_id: str, name: str, *parts: str | Sequence[int], **kwargs: Any) -> AddRequest:
        """One that needs the adapter of that name."""
        parts = parts or ([1, 2],)
        if self.is_lora:
            return self.fakes.request(request_id, *parts, lora=name, **kwargs)
        return self.fakes.request(request_id, name, *parts, **kwargs)

    def ask(self, *args: Any, **kwargs: Any) -> None:
        self.engine.handle(self.request(*args, **kwargs))


@pytest.fixture(params=["lora", "key_values"])
def case(fakes: Any, request: pytest.FixtureRequest) -> Case:
    return Case(fakes, request.param, max_loras=1)


@pytest.fixture
def begun(case: Case) -> Case:
    """An adapter comes that has had its first piece of four."""
    case.load("x", pieces=4)
    assert case.engine.has_work
    return case


def told(result: StepResult) -> list[tuple[str, str]]:
    return [(output.request_id, output.error_reason) for output in result.outputs]


def tokens(engine: Engine) -> list[int]:
    """What all requests are told to their ends."""
    found = []
    while engine.has_work:
        found += [output.token_id for output in engine.step().outputs if output.token_id is not None]
    return found


def test_who_needs_it_waits_and_nobody_else_does(begun: Case) -> None:
    engine = begun.engine
    begun.ask("with", "x")
    engine.handle(begun.fakes.request("without", [1, 2]))
    for _ in range(2):
        assert told(engine.step()) == [("without", "")]
        assert begun.runner.arrived == []
    assert sorted(told(engine.step())) == [("with", ""), ("without", "")]
    assert begun.runner.arrived == ["sha256:x"]
    engine.check()


def test_keys_and_values_that_came_in_pieces_are_those_that_were_sent(fakes: Any) -> None:
    case = Case(fakes, "key_values", max_loras=1)
    case.load("x", pieces=4)
    request = case.request("0", "x", [5, 6], max_tokens=4)
    case.engine.handle(request)
    assert tokens(case.engine) == fakes.solo(request, [fakes.adapter("x", 3, are_key_values=True)])


@pytest.mark.parametrize("kind", ["lora", "key_values"])
def test_one_comes_in_after_the_other(fakes: Any, kind: str) -> None:
    case = Case(fakes, kind, max_loras=2)
    for name in "xyy":
        case.load(name, pieces=2)
    case.ask("y", "y", max_tokens=1)
    case.ask("x", "x", max_tokens=1)
    finished = []
    while case.engine.has_work:
        finished += told(case.engine.step())
    assert finished == [("x", ""), ("y", "")]
    assert case.runner.arrived == ["sha256:x", "sha256:y"]


@pytest.mark.parametrize("order", ["lora first", "key_values first"])
def test_a_request_waits_for_all_that_it_needs(fakes: Any, order: str) -> None:
    case = Case(fakes, "key_values", max_loras=1)
    if order == "key_values first":
        case.load("k", pieces=3)
    case.engine.handle(fakes.lora("x", pieces=3))
    if order == "lora first":
        case.load("k", pieces=3)
    request = fakes.request("0", "k", [1, 2], lora="x", max_tokens=1)
    case.engine.handle(request)
    for digest in ("sha256:k", "sha256:x"):
        case.engine.handle(DropAdapter(digest=digest))  # at its end
    finished: list[tuple[str, str]] = []
    while not finished:
        case.engine.check()
        assert case.engine.has_work
        finished += told(case.engine.step())
    assert finished == [("0", "")]
    assert not case.engine.has_work
    assert case.runner.arrived == []


def test_a_request_may_leave_before_it_is_there(begun: Case) -> None:
    begun.ask("0", "x")
    begun.engine.abort("0")
    while begun.engine.has_work:
        assert told(begun.engine.step()) == []
    assert begun.runner.arrived == ["sha256:x"]


def test_an_id_in_use_is_refused_while_its_first_request_waits(begun: Case) -> None:
    for _ in range(2):
        begun.ask("0", "x")
    assert told(begun.engine.step()) == [("0", "INVALID_ARGUMENT")]
    begun.engine.step()
    assert told(begun.engine.step()) == [("0", "")]


def test_what_a_later_piece_fails_with_is_told_to_all_who_wait_and_its_place_is_free(begun: Case) -> None:
    for request_id in ("0", "1"):
        begun.ask(request_id, "x")
    begun.runner.load_error = AdapterInvalid("not of this model")
    begun.engine.step()
    begun.engine.step()
    assert told(begun.engine.step()) == [("0", "ADAPTER_INVALID"), ("1", "ADAPTER_INVALID")]
    assert not begun.engine.has_work
    begun.runner.load_error = None
    begun.load("y")
    assert begun.runner.arrived == ["sha256:y"]
    assert begun.engine.step().stats.resident_adapters == 1
    begun.engine.check()


def test_one_that_is_dropped_comes_no_further(begun: Case) -> None:
    begun.engine.handle(DropAdapter(digest="sha256:x"))
    assert not begun.engine.has_work
    begun.load("y")
    assert begun.runner.arrived == ["sha256:y"]


def test_one_that_is_dropped_before_its_turn_is_not_there(fakes: Any) -> None:
    case = Case(fakes, "key_values", max_loras=1)
    for name in "xy":
        case.load(name, pieces=2)
    case.engine.handle(DropAdapter(digest="sha256:y"))
    case.ask("0", "y")
    assert told(case.engine.step()) == [("0", "ADAPTER_NOT_FOUND")]
    assert case.runner.arrived == ["sha256:x"]


def test_one_that_a_request_waits_for_is_dropped_after_that_request(case: Case) -> None:
    case.load("x", pieces=2)
    case.ask("0", "x", max_tokens=2)
    case.engine.handle(DropAdapter(digest="sha256:x"))
    assert told(case.engine.step()) == [("0", "")]
    assert case.runner.arrived == ["sha256:x"]
    assert told(case.engine.step()) == [("0", "")]
    assert case.runner.arrived == []


def test_what_else_a_request_needs_stays_while_it_waits(begun: Case) -> None:
    begun.engine.handle(begun.fakes.adapter("a", 3))
    request = begun.request("0", "x", "a", [1, 2], max_tokens=1)
    begun.engine.handle(request)
    begun.engine.handle(DropAdapter(digest="sha256:a"))
    for _ in range(2):
        assert told(begun.engine.step()) == []
    assert told(begun.engine.step()) == [("0", "")]
    assert begun.engine.step().stats.resident_adapters == 1


def test_one_that_is_dropped_and_then_fails_leaves_nothing_to_drop(begun: Case) -> None:
    begun.ask("0", "x")
    begun.engine.handle(DropAdapter(digest="sha256:x"))
    begun.runner.load_error = AdapterInvalid("not of this model")
    finished = []
    while begun.engine.has_work:
        finished += told(begun.engine.step())
        begun.engine.check()
    assert finished == [("0", "ADAPTER_INVALID")]
    begun.runner.load_error = None
    begun.load("y")
    assert begun.runner.arrived == ["sha256:y"]


def test_one_that_is_interrupted_is_not_there_and_comes_whole_when_it_is_loaded_again(begun: Case) -> None:
    engine = begun.engine
    begun.ask("0", "x")
    engine.handle(DropAdapter(digest="sha256:x"))
    begun.runner.load_error = KeyboardInterrupt()
    for _ in range(2):
        engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    begun.runner.load_error = None
    assert not engine.has_work
    error = engine.load_error("sha256:x")
    assert error is not None
    assert error.reason == "INTERNAL"
    engine.check()
    begun.load("x", pieces=2)
    begun.ask("1", "x", max_tokens=1)
    assert told(engine.step()) == [("1", "")]
    assert begun.runner.arrived == ["sha256:x"]


def test_rows_whose_loading_is_interrupted_are_not_there(fakes: Any) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    runner.load_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.handle(fakes.adapter("a", 3))
    runner.load_error = None
    engine.handle(fakes.adapter("a", 3))
    request = fakes.request("0", "a", [1, 2])
    engine.handle(request)
    assert tokens(engine) == fakes.solo(request, [fakes.adapter("a", 3)])
