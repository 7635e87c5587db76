import pytest

from benchmarks.step import Stopwatch, decodes, prompt


def test_decodes_have_pages_of_their_own_for_their_whole_context() -> None:
    plan = decodes(58, page_size=16)
    assert len(plan.chunks) == 58
    pages = [page for chunk in plan.chunks for page in chunk.page_ids]
    assert len(set(pages)) == len(pages)
    assert all(chunk.start < 16 * len(chunk.page_ids) for chunk in plan.chunks)
    assert len({chunk.start for chunk in plan.chunks}) > 20


@pytest.mark.parametrize(("num_tokens", "start"), [(32, 20), (128, 512), (1, 0)])
def test_a_prompt_has_pages_for_what_is_before_it_and_for_itself(num_tokens: int, start: int) -> None:
    [chunk] = prompt(num_tokens, start, page_size=16).chunks
    assert len(chunk.token_ids) == num_tokens
    assert 16 * (len(chunk.page_ids) - 1) < start + num_tokens <= 16 * len(chunk.page_ids)


def test_time_is_counted_for_the_part_it_was_spent_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def work(self) -> int:
            return 7

    monkeypatch.setattr("benchmarks.step._PARTS", [("layers", Owner, "work")])
    watch = Stopwatch()
    assert Owner().work() == 7
    assert watch.seconds["layers"] > 0
