"""How likely a prompt is equals what PEFT and transformers compute: float32, within 1e-4."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_api.params import SamplingParams
from softprompt_inference.engine import scheduler
from softprompt_inference.engine.messages import AddRequest, Logprobs, Output, TextPart
from softprompt_inference.engine.plan import Chunk, Scores, StepPlan
from softprompt_inference.model import scorer
from softprompt_inference.model.loader import LoadedModel
from softprompt_kernels import native
from torch import Tensor

KINDS = ["prompt_tuning", "p_tuning_mlp", "cpt", "multitask", "prefix", "cartridge"]
TOLERANCE = 1e-4


def told(outputs: Sequence[Output]) -> list[Logprobs | None]:
    return [each for output in outputs for each in output.prompt_logprobs or ()]


def asking(requests: Sequence[Any]) -> list[Any]:
    return [replace(request, prompt_logprobs=2) for request in requests]


def differences(lab: Any, path: Path, requests: Sequence[Any], served: Sequence[Sequence[Output]]) -> list[float]:
    """How far each log-probability is from the oracle's; the same tokens must be without one."""
    found = []
    for request, outputs in zip(requests, served, strict=True):
        for own, expected in zip(told(outputs), lab.oracle(path).prompt_logprobs(request), strict=True):
            assert (own is None) == (expected is None)
            if own is not None:
                found.append(abs(own.chosen - expected))
    return found


def assert_equal(lab: Any, path: Path, requests: Sequence[Any], served: Sequence[Sequence[Output]]) -> None:
    """Prompts and what follows them equal the oracle's."""
    assert max(differences(lab, path, requests, served)) <= TOLERANCE
    tokens = [[output for output in outputs if output.prompt_logprobs is None] for outputs in served]
    lab.compare(path, requests, tokens).assert_equal()


@pytest.mark.parametrize("count", [16, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_cold_and_warm(lab: Any, llama: Path, kind: str, count: int) -> None:
    requests = asking(lab.requests([lab.adapter(llama, kind, count)], max_tokens=2))
    engine = lab.engine(llama)
    for _ in range(2):
        assert_equal(lab, llama, requests, lab.serve(engine, requests))


@pytest.mark.parametrize(("max_scores", "rows_at_once"), [(3, 128), (512, 5)])
@pytest.mark.parametrize("max_step_tokens", [7, 64])
def test_all_kinds_and_loras_in_one_batch_in_small_steps(
    lab: Any,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_step_tokens: int,
    max_scores: int,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORES", max_scores)
    monkeypatch.setattr(scorer, "_ROWS_AT_ONCE", rows_at_once)
    requests = lab.requests([*(lab.adapter(llama, kind, 20) for kind in KINDS), None, None], max_tokens=3)
    lora, soft_prompt = lab.lora(llama), lab.adapter(llama, "prompt_tuning", 5)
    requests += [replace(request, lora=lora) for request in requests[-1:] + requests[:1] + requests[4:5]]
    ids = requests[0].prompt_ids
    for parts in (
        (ids, soft_prompt, ids[:3]),
        (requests[4].adapter, soft_prompt, ids),
        (soft_prompt, ids, soft_prompt),
    ):
        requests.append(replace(requests[0], adapter=None, parts=parts))
    asked = [replace(one, prompt_logprobs=0) if number % 3 else one for number, one in enumerate(requests)]
    served = lab.serve(lab.engine(llama, max_step_tokens=max_step_tokens), asked)
    those = [(one, own) for one, own in zip(asked, served, strict=True) if one.prompt_logprobs is not None]
    assert_equal(lab, llama, *zip(*those, strict=True))
    others = [(one, own) for one, own in zip(asked, served, strict=True) if one.prompt_logprobs is None]
    lab.compare(llama, *zip(*others, strict=True)).assert_equal()


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt2"])
def test_other_models(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = asking(lab.requests([lab.adapter(path, "prompt_tuning", 20), None], length=30, max_tokens=2))
    engine = lab.engine(path)
    for _ in range(2):
        assert_equal(lab, path, requests, lab.serve(engine, requests))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gpu_computes_the_same_in_float32(lab: Any, name: str) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, kind, 20) for kind in ("prompt_tuning", "prefix")]
    requests = asking(lab.requests([*adapters, None], length=30))
    engine = lab.engine(path, device="cuda")
    for _ in range(2):
        assert_equal(lab, path, requests, lab.serve(engine, requests))


def test_without_native_kernels(lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(llama)
    monkeypatch.setattr(native, "_library", None)
    requests = asking(lab.requests([lab.adapter(llama, "prompt_tuning", 20), None]))
    assert_equal(lab, llama, requests, lab.serve(engine, requests))


@pytest.mark.parametrize("with_lora", [False, True])
def test_in_bfloat16_a_prompt_is_as_likely_as_its_tokens_were_when_they_were_chosen(
    lab: Any, with_lora: bool
) -> None:
    """Stacks of layers, LoRA within products: the logits of a row do not depend on which others are wanted."""
    path = lab.model("llama_wide")
    engine = lab.engine(path, dtype="bfloat16", enable_prefix_caching=False)
    if not native.supports_linear(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this processor does not multiply pairs of bfloat16")
    [whole] = asking(lab.requests([None], length=24, max_tokens=1))
    if with_lora:
        whole = replace(whole, lora=lab.lora(path))
    [outputs] = lab.serve(engine, [whole])
    for length, own in enumerate(told(outputs)[1:], start=1):
        [behind] = lab.serve(engine, [replace(whole, prompt_ids=whole.prompt_ids[:length])])
        assert own is not None
        # What a request for the beginning alone chose is as likely as the likeliest here, to the last bit.
        assert own.top[0][1] == behind[-1].logprobs.chosen


def test_alternatives_are_the_likeliest_tokens(lab: Any, llama: Path) -> None:
    [request] = lab.requests([lab.adapter(llama, "prompt_tuning", 5)], max_tokens=1)
    [most] = lab.serve(engine := lab.engine(llama), [replace(request, prompt_logprobs=20)])
    [few] = lab.serve(engine, [replace(request, prompt_logprobs=3)])
    for own, other in zip(told(most), told(few), strict=True):
        assert own is not None
        assert other is not None
        values = [value for _, value in own.top]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert own.top[:3] == other.top
        assert own.chosen <= values[0]


def test_a_row_that_is_scored_is_computed_beside_captured_decodes(lab: Any, llama: Path) -> None:
    runner = lab.runner(llama)
    plain = StepPlan(
        chunks=[
            Chunk(
                token_ids=[5],
                start=0,
                page_ids=[0],
                sample=None,
                scores=Scores(rows=[0], token_ids=[6], num_top=1),
            )
        ]
    )
    [expected] = runner.run(plain)
    runner.capture_decodes(max_sequences=3, max_model_len=64, capture=lambda compute: compute)
    [answer] = runner.run(plain)
    assert answer == expected
    assert answer.token_id is None
    assert len(answer.scores) == 1


def test_a_prompt_whose_numbers_overflow_is_refused_alone(lab: Any, llama: Path) -> None:
    engine = lab.engine(llama)
    broken, healthy = asking(lab.requests([lab.adapter(llama, "prompt_tuning", 5), None], max_tokens=2))
    load = broken.adapter.load
    rows = torch.full((load.num_virtual_tokens, load.row_size), torch.inf).numpy().tobytes()
    broken = replace(broken, adapter=replace(broken.adapter, load=replace(load, rows=rows)))
    lab.submit(engine, [broken, healthy])
    outputs: dict[str, list[Output]] = {"0": [], "1": []}
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    assert [output.error_message for output in outputs["0"]] == ["the model's logits are not finite"]
    assert_equal(lab, llama, [healthy], [outputs["1"]])


def test_a_prompt_of_several_steps_has_few_logits_at_a_time(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    compute = LoadedModel.logits

    def noted(self: LoadedModel, embeddings: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        logits = compute(self, embeddings, positions, rows)
        sizes.append(len(logits))
        return logits

    monkeypatch.setattr(scheduler, "MAX_SCORES", 128)
    engine = lab.engine(llama)
    monkeypatch.setattr(LoadedModel, "logits", noted)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    engine.add(AddRequest(request_id="0", prompt=[TextPart(token_ids=[5, 6, 7] * 80)], params=params))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step().outputs
    assert len(told(outputs)) == 240
    assert sizes == [128, 112]


# From here on something is broken on purpose: the comparison must notice.


def test_logits_of_the_next_row_are_noticed(lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asking(lab.requests([lab.adapter(llama, "prompt_tuning", 5)], max_tokens=1))
    engine = lab.engine(llama)
    compute = LoadedModel.logits

    def shifted(self: LoadedModel, embeddings: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return compute(self, embeddings, positions, (rows + 1).clamp(max=len(positions) - 1))

    monkeypatch.setattr(LoadedModel, "logits", shifted)
    assert max(differences(lab, llama, requests, lab.serve(engine, requests))) > 100 * TOLERANCE


def test_swapped_adapters_are_noticed(lab: Any, llama: Path) -> None:
    one, other = asking(lab.requests([lab.adapter(llama, "prompt_tuning", 5, seed=seed) for seed in (0, 1)]))
    swapped = [replace(one, adapter=other.adapter), replace(other, adapter=one.adapter)]
    assert max(differences(lab, llama, swapped, lab.serve(lab.engine(llama), [one, other]))) > 100 * TOLERANCE
