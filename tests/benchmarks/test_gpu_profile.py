from pathlib import Path

import pytest
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.runner import load_runner

from benchmarks.gpu_profile import compute_contexts, decodes, kernel_times


def test_decodes_have_pages_of_their_own_for_their_whole_context() -> None:
    plan = decodes(5, 40, page_size=16)
    pages = [page for chunk in plan.chunks for page in chunk.page_ids]
    assert len(pages) == len(set(pages)) == 5 * 3
    assert {chunk.start for chunk in plan.chunks} == {39}
    assert all(len(chunk.token_ids) == 1 for chunk in plan.chunks)


def test_the_longest_stands_first(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = EngineConfig(model_path=str(tiny_model), device="cpu", kv_cache_bytes=2**22)
    runner = load_runner(config, lambda _: None)
    plan = decodes(3, 20, runner.info.page_size)
    compute_contexts(runner, plan)
    times = kernel_times(runner, plan)
    capfd.readouterr()  # the profiler's own words
    microseconds = [each for _, each, _ in times]
    assert microseconds == sorted(microseconds, reverse=True)
    # Nothing of the steps before those that are counted.
    assert [launches for name, _, launches in times if name == "aten::embedding"] == [1]
