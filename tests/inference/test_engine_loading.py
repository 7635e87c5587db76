"""LoRAs that come in over several steps."""

import pytest
from softprompt_api.errors import AdapterInvalid
from softprompt_inference.engine.messages import DropAdapter


def begin(fakes, *, pieces: int = 4, max_loras: int = 4):
    """An engine to which a LoRA comes that has had its first piece."""
    runner = fakes.runner()
    engine = fakes.engine(runner, max_loras=max_loras)
    engine.handle(fakes.lora("x", pieces=pieces))
    assert engine.has_work
    return runner, engine


def told(result) -> list[tuple[str, str]]:
    return [(output.request_id, output.error_reason) for output in result.outputs]


def test_who_needs_it_waits_and_nobody_else_does(fakes) -> None:
    runner, engine = begin(fakes)
    engine.handle(fakes.request("with", [1, 2], lora="x"))
    engine.handle(fakes.request("without", [1, 2]))
    for _ in range(2):
        assert told(engine.step()) == [("without", "")]
        assert runner.loras == {}
    assert sorted(told(engine.step())) == [("with", ""), ("without", "")]
    assert runner.loras == {0: "sha256:x"}
    engine.check()


def test_one_comes_in_after_the_other(fakes) -> None:
    runner, engine = begin(fakes, pieces=2)
    engine.handle(fakes.lora("y", pieces=2))
    engine.handle(fakes.lora("y", pieces=2))
    engine.handle(fakes.request("y", [1], lora="y", max_tokens=1))
    engine.handle(fakes.request("x", [1], lora="x", max_tokens=1))
    finished = []
    while engine.has_work:
        finished += told(engine.step())
    assert finished == [("x", ""), ("y", "")]
    assert runner.loras == {0: "sha256:x", 1: "sha256:y"}


def test_a_request_may_leave_before_it_is_there(fakes) -> None:
    runner, engine = begin(fakes)
    engine.handle(fakes.request("0", [1], lora="x"))
    engine.abort("0")
    while engine.has_work:
        assert told(engine.step()) == []
    assert runner.loras == {0: "sha256:x"}


def test_an_id_in_use_is_refused_while_its_first_request_waits(fakes) -> None:
    _, engine = begin(fakes)
    for _ in range(2):
        engine.handle(fakes.request("0", [1], lora="x"))
    assert told(engine.step()) == [("0", "INVALID_ARGUMENT")]
    engine.step()
    assert told(engine.step()) == [("0", "")]


def test_what_a_later_piece_fails_with_is_told_to_all_who_wait_and_the_slot_is_free(fakes) -> None:
    runner, engine = begin(fakes, max_loras=1)
    for request_id in ("0", "1"):
        engine.handle(fakes.request(request_id, [1], lora="x"))
    runner.load_error = AdapterInvalid("not of this model")
    engine.step()
    engine.step()
    assert told(engine.step()) == [("0", "ADAPTER_INVALID"), ("1", "ADAPTER_INVALID")]
    assert not engine.has_work
    runner.load_error = None
    engine.handle(fakes.lora("y"))
    assert runner.loras == {0: "sha256:y"}
    engine.check()


def test_one_that_is_dropped_comes_no_further(fakes) -> None:
    runner, engine = begin(fakes, max_loras=1)
    engine.handle(DropAdapter(digest="sha256:x"))
    assert not engine.has_work
    engine.handle(fakes.lora("y"))
    assert runner.loras == {0: "sha256:y"}


def test_one_that_a_request_waits_for_is_dropped_after_that_request(fakes) -> None:
    runner, engine = begin(fakes, pieces=2)
    engine.handle(fakes.request("0", [1], lora="x", max_tokens=2))
    engine.handle(DropAdapter(digest="sha256:x"))
    assert told(engine.step()) == [("0", "")]
    assert runner.loras == {0: "sha256:x"}
    assert told(engine.step()) == [("0", "")]
    assert runner.loras == {}


def test_one_that_is_dropped_and_then_fails_leaves_nothing_to_drop(fakes) -> None:
    runner, engine = begin(fakes, max_loras=1)
    engine.handle(fakes.request("0", [1], lora="x"))
    engine.handle(DropAdapter(digest="sha256:x"))
    runner.load_error = AdapterInvalid("not of this model")
    finished = []
    while engine.has_work:
        finished += told(engine.step())
        engine.check()
    assert finished == [("0", "ADAPTER_INVALID")]
    runner.load_error = None
    engine.handle(fakes.lora("y"))
    assert runner.loras == {0: "sha256:y"}


def test_one_that_is_interrupted_is_not_there_and_comes_whole_when_it_is_loaded_again(fakes) -> None:
    runner, engine = begin(fakes, max_loras=1)
    engine.handle(fakes.request("0", [1], lora="x"))
    engine.handle(DropAdapter(digest="sha256:x"))
    runner.load_error = KeyboardInterrupt()
    for _ in range(2):
        engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    runner.load_error = None
    assert not engine.has_work
    assert engine.load_error("sha256:x").reason == "INTERNAL"
    engine.check()
    engine.handle(fakes.lora("x", pieces=2))
    engine.handle(fakes.request("1", [1], lora="x", max_tokens=1))
    assert told(engine.step()) == [("1", "")]
    assert runner.loras == {0: "sha256:x"}


def test_rows_whose_loading_is_interrupted_are_not_there(fakes) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    runner.load_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.handle(fakes.adapter("a", 3))
    runner.load_error = None
    engine.handle(fakes.adapter("a", 3))
    request = fakes.request("0", "a", [1, 2])
    engine.handle(request)
    tokens = []
    while engine.has_work:
        tokens += [output.token_id for output in engine.step().outputs]
    assert tokens == fakes.solo(request, [fakes.adapter("a", 3)])
