import pytest
import torch
from softprompt_inference.model.lora.linears import Linear

from benchmarks.step import Stopwatch, decodes, make_steps, prompt, random_lora, with_loras


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


def test_decodes_use_their_loras_in_turn() -> None:
    plan = decodes(5, page_size=16)
    assert [chunk.lora for chunk in plan.chunks] == [-1] * 5
    assert [chunk.lora for chunk in with_loras(plan, 2).chunks] == [0, 1, 0, 1, 0]


def test_a_lora_of_the_bench_changes_every_linear() -> None:
    linears = [Linear(name=name, in_features=6, out_features=4, dtype=torch.bfloat16) for name in ("a", "b")]
    lora = random_lora(linears, 3, seed=0)
    assert [(each.name, each.rank, len(each.a), len(each.b)) for each in lora.modules] == [
        (name, 3, 4 * 3 * 6, 4 * 4 * 3) for name in ("a", "b")
    ]
    assert random_lora(linears, 3, seed=0) == lora
    assert random_lora(linears, 3, seed=1).modules[0].a != lora.modules[0].a


def test_a_step_with_loras_stands_behind_the_same_without() -> None:
    for only_lora in (False, True):
        steps = make_steps(16, only_lora=only_lora)
        labels = [label for label, loras, _ in steps if loras == 0]
        assert len(set(labels)) == len(labels)
        seen = set()
        for label, loras, plan in steps:
            assert loras == 0 or label in seen
            assert loras <= len(plan.chunks)
            seen.add(label)
        wanted = {("16 decodes", 1), ("16 decodes", 16), ("128 tokens behind 60", 1)}
        assert wanted <= {(label, loras) for label, loras, _ in steps}
    assert all(any(loras and other == label for other, loras, _ in steps) for label, _, _ in steps)


def test_time_is_counted_for_the_part_it_was_spent_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def work(self) -> int:
            return 7

    monkeypatch.setattr("benchmarks.step._PARTS", [("layers", Owner, "work")])
    watch = Stopwatch()
    assert Owner().work() == 7
    assert watch.seconds["layers"] > 0
