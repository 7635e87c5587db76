"""Served tokens beside PEFT's: equal where they are, and every difference is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from softprompt import LLM, LoRARequest, PromptAdapterRequest, SamplingParams
from softprompt.peft_folder import write_folder
from softprompt.verify import PROMPTS, Replay, Replayed, Served, compare
from softprompt_api.formats import parse_config

MakeAdapter = Callable[..., Path]
KINDS = ["prompt_tuning", "prefix_tuning", "multitask", "lora"]
SERVED = Served(prompt="x", prompt_ids=[1], token_ids=[5, 6, 7], logprobs=[-1.0, -2.0, -3.0])
REPLAYED = Replayed(best_ids=[5, 6, 7], margins=[0.0, 0.0, 0.0], logprobs=[-1.0, -2.0, -3.0])


def test_the_same_tokens_and_logprobs_are_equal() -> None:
    found = compare(SERVED, REPLAYED, tolerance=1e-4)
    assert found.is_equal
    assert (found.num_tokens, found.num_ties, found.first_difference, found.largest_delta) == (3, 0, None, 0)


def test_the_first_token_that_differs_is_told() -> None:
    replayed = replace(REPLAYED, best_ids=[5, 9, 9], margins=[0.0, 0.5, 0.5])
    found = compare(SERVED, replayed, tolerance=1e-4)
    assert (found.first_difference, found.num_ties, found.is_equal) == (1, 0, False)


def test_tokens_that_rounding_may_swap_are_counted_and_no_difference() -> None:
    replayed = replace(REPLAYED, best_ids=[5, 9, 7], margins=[0.0, 1.9e-4, 0.0])
    found = compare(SERVED, replayed, tolerance=1e-4)
    assert (found.first_difference, found.num_ties, found.is_equal) == (None, 1, True)


def test_the_largest_difference_of_logprobs_decides_too() -> None:
    replayed = replace(REPLAYED, logprobs=[-1.0, -2.0002, -3.0001])
    found = compare(SERVED, replayed, tolerance=1e-4)
    assert found.largest_delta == pytest.approx(2e-4)
    assert not found.is_equal
    assert compare(SERVED, replayed, tolerance=1e-3).is_equal


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), device="cpu", dtype="float32", kv_cache_gb=0.02, max_model_len=512)


def served(llm: LLM, kind: str, folder: Path) -> list[Served]:
    """What the engine makes of the fixed prompts."""
    if kind == "lora":
        request: dict[str, Any] = {"lora_request": LoRARequest(kind, 1, str(folder))}
    else:
        task = 1 if kind == "multitask" else None
        adapter = PromptAdapterRequest(kind, 1 + KINDS.index(kind), str(folder), prompt_adapter_task=task)
        request = {"prompt_adapter_request": adapter}
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate(list(PROMPTS), params, use_tqdm=False, **request)
    return [
        Served(
            prompt=output.prompt or "",
            prompt_ids=output.prompt_token_ids,
            token_ids=output.outputs[0].token_ids,
            logprobs=[
                each[token_id].logprob
                for token_id, each in zip(
                    output.outputs[0].token_ids, output.outputs[0].logprobs or (), strict=True
                )
            ],
        )
        for output in outputs
    ]


def replay(model: Path, folder: Path, into: Path, kind: str) -> Replay:
    spec = parse_config((folder / "adapter_config.json").read_text())
    write_folder(into, spec, (folder / "adapter_model.safetensors").read_bytes())
    return Replay(model, into, task=1 if kind == "multitask" else None)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_equal_to_its_replay_and_to_no_other(
    llm: LLM, tiny_model: Path, make_adapter: MakeAdapter, tmp_path: Path, kind: str
) -> None:
    folder, other = make_adapter(70, kind=kind), make_adapter(71, kind=kind)
    own = served(llm, kind, folder)
    for adapter, is_equal in ((folder, True), (other, False)):
        into = tmp_path / str(is_equal)
        into.mkdir()
        peft = replay(tiny_model, adapter, into, kind)
        comparisons = [compare(one, peft.run(one), tolerance=1e-4) for one in own]
        assert [one.is_equal for one in comparisons] == [is_equal] * len(PROMPTS), comparisons
