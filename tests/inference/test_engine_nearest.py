"""Searches for nearest tokens run piece by piece beside the steps, and end with an answer or a reason."""

from typing import Any

import pytest
from softprompt_inference.engine.messages import AbortSearch, FindNearest, Nearest, NearRow


def steps_until_found(engine: Any, *, max_steps: int = 50) -> list[Nearest]:
    """Step until nothing is left to do; what was found, in order."""
    found: list[Nearest] = []
    for _ in range(max_steps):
        if not engine.has_work:
            return found
        found += engine.step().found
        engine.check()
    raise AssertionError("the engine does not come to an end")


def test_a_search_is_answered_with_the_rows_of_its_adapter(fakes: Any) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 3))
    engine.handle(fakes.adapter("b", 4))
    engine.handle(FindNearest(search_id=7, digest="sha256:b", top_k=2))
    assert steps_until_found(engine) == [
        Nearest(search_id=7, rows=[NearRow(norm=1.0, tokens=[(fakes.vocab_size + 3, 0.5)] * 2)])
    ]


def test_a_step_computes_its_sequences_and_one_piece_of_the_oldest_search(fakes: Any) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 3))
    for search_id in (1, 2):
        engine.handle(FindNearest(search_id=search_id, digest="sha256:a", top_k=1))
    engine.handle(fakes.request("x", "a", [1, 2, 3], max_tokens=8))
    pieces, tokens, found = [], [], []
    while engine.has_work:
        result = engine.step()
        pieces.append([search.num_pieces for search in runner.searches])
        tokens.append(len(result.outputs))
        found += [answer.search_id for answer in result.found]
    assert pieces[:6] == [[1], [2], [3], [3, 1], [3, 2], [3, 3]]  # who waits holds no rows
    assert tokens == [1] * 8  # no step of the request waited
    assert found == [1, 2]


def test_only_embeddings_are_near_tokens(fakes: Any) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.adapter("k", 3, are_key_values=True))
    engine.handle(fakes.lora("x"))
    for search_id, name in enumerate(("k", "x", "nobody")):
        engine.handle(FindNearest(search_id=search_id, digest=f"sha256:{name}", top_k=1))
    answers = steps_until_found(engine)
    assert [answer.error_reason for answer in answers] == [
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        "ADAPTER_NOT_FOUND",
    ]
    assert answers[0].error_field == "adapter"
    assert all(not answer.rows for answer in answers)


@pytest.mark.parametrize("when", ["at its beginning", "in a piece"])
def test_a_search_that_fails_harms_nobody_else(fakes: Any, when: str) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 3))
    if when == "at its beginning":
        runner.load_error = RuntimeError("out of memory")
    engine.handle(FindNearest(search_id=1, digest="sha256:a", top_k=1))
    first = engine.step().found
    runner.load_error = None
    for search in runner.searches:
        search.error = RuntimeError("out of memory")
    engine.handle(FindNearest(search_id=2, digest="sha256:a", top_k=1))
    request = fakes.request("x", "a", [1, 2, 3])
    engine.handle(request)
    second = []
    while engine.has_work:
        result = engine.step()
        first += result.found
        second += result.outputs
    assert [answer.error_reason for answer in first] == ["INTERNAL", ""]
    assert "memory" not in first[0].error_message
    assert [output.token_id for output in second] == fakes.solo(request, [fakes.adapter("a", 3)])


def test_an_adapter_that_could_not_be_loaded_says_why(fakes: Any) -> None:
    engine = fakes.engine(fakes.runner())
    engine.handle(fakes.adapter("a", 13))  # more virtual tokens than are allowed
    engine.handle(FindNearest(search_id=1, digest="sha256:a", top_k=1))
    [answer] = steps_until_found(engine)
    assert answer.error_reason == "ADAPTER_INVALID"


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_search_that_nobody_wants_any_more_is_not_computed(fakes: Any, num_steps: int) -> None:
    runner = fakes.runner()
    engine = fakes.engine(runner)
    engine.handle(fakes.adapter("a", 3))
    for search_id in (1, 2, 3):
        engine.handle(FindNearest(search_id=search_id, digest="sha256:a", top_k=search_id))
    for _ in range(num_steps):
        engine.step()
    for search_id in (1, 2, 99):
        engine.handle(AbortSearch(search_id=search_id))
    assert [answer.search_id for answer in steps_until_found(engine)] == [3]
    assert [search.num_pieces for search in runner.searches] == [1] * num_steps + [3]
