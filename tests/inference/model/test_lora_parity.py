"""A request with a LoRA is answered as by PEFT alone: float32, greedy, ids equal and logprobs within 1e-4."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_inference.engine import sequence as sequence_module
from softprompt_inference.engine.messages import DropAdapter
from softprompt_inference.model import runner as runner_module
from softprompt_inference.model.errors import ModelSourceError
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_kernels import native

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
# One after the other of these, each with other weights.
SHAPES: list[dict[str, Any]] = [
    {"targets": ["q_proj", "v_proj"], "rank": 8},
    {"rank": 1},
    {"targets": ATTENTION, "rank": 16, "use_rslora": True},
    {"targets": ["gate_proj"], "rank": 4, "lora_alpha": 32},
    {"targets": MLP, "rank": 5},
    {"rank": 64},
    {"targets": ["v_proj"], "rank": 2, "layers_to_transform": [1]},
    {
        "rank": 8,
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.v_proj": 12},
        "alpha_pattern": {"down_proj": 40, "layers.0.self_attn.q_proj": 2},
    },
]


def loras(lab: Any, path: Path, count: int) -> list[Any]:
    return [lab.lora(path, seed=seed, **shape) for seed, shape in zip(range(count), cycle(SHAPES), strict=False)]


def with_loras(requests: Sequence[Any], used: Sequence[Any]) -> list[Any]:
    return [replace(request, lora=lora) for request, lora in zip(requests, used, strict=True)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_every_linear_of_an_architecture(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = with_loras(lab.requests([None]), [lab.lora(path)])
    outputs = lab.serve(lab.engine(path), requests)
    lab.compare(path, requests, outputs).assert_equal()


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_every_shape_alone(lab: Any, llama: Path, index: int) -> None:
    requests = with_loras(lab.requests([None]), [loras(lab, llama, len(SHAPES))[index]])
    lab.compare(llama, requests, lab.serve(lab.engine(llama), requests)).assert_equal()


def mixed(lab: Any, path: Path, **settings: int) -> list[Any]:
    """Sixteen LoRAs, half of them with a soft prompt, one LoRA twice, soft prompts, and the base model."""
    used = loras(lab, path, 16)
    soft = [lab.adapter(path, kind, count) for kind, count in (("prompt_tuning", 20), ("cpt", 5))]
    adapters = [soft[i % 2] if i % 4 < 2 else None for i in range(16)]
    requests = lab.requests([*adapters, None, soft[0], soft[1], None, None], **settings)
    return with_loras(requests, [*used, used[3], None, None, None, None])


def test_sixteen_loras_soft_prompts_and_the_base_model_in_one_batch(lab: Any, llama: Path) -> None:
    requests = mixed(lab, llama)
    engine = lab.engine(llama)
    outputs = lab.serve(engine, requests)
    lab.compare(llama, requests, outputs).assert_equal()
    assert engine.step().stats.resident_adapters == 18


def test_sixty_four_different_loras_in_one_batch(lab: Any, llama: Path) -> None:
    used = [lab.lora(llama, rank=1 + seed % 8, seed=seed) for seed in range(64)]
    requests = with_loras(lab.requests([None] * 65), [*used, None])
    engine = lab.engine(llama, max_loras=64)
    lab.submit(engine, requests)
    outputs: list[list[Any]] = [[] for _ in requests]
    largest = 0
    while engine.has_work:
        step = engine.step()
        largest = max(largest, len({output.request_id for output in step.outputs}))
        for output in step.outputs:
            outputs[int(output.request_id)].append(output)
    assert largest == 65, "they were never all in one step"
    lab.compare(llama, requests, outputs).assert_equal()
    assert engine.step().stats.resident_adapters == 64


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_gpu_computes_the_same_in_float32(lab: Any, name: str) -> None:
    path = lab.model(name)
    used = [lab.lora(path, rank=rank, seed=seed) for seed, rank in enumerate((1, 8, 16, 64))]
    soft = lab.adapter(path, "prompt_tuning", 20)
    requests = with_loras(lab.requests([None, soft, None, soft, soft, None]), [*used, None, None])
    outputs = lab.serve(lab.engine(path, device="cuda"), requests)
    lab.compare(path, requests, outputs).assert_equal()


def test_weights_that_are_kept_in_bfloat16(lab: Any) -> None:
    path = lab.model("llama", torch.bfloat16)
    requests = mixed(lab, path)
    lab.compare(path, requests, lab.serve(lab.engine(path), requests)).assert_equal()


def test_without_native_kernels(lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(llama)
    monkeypatch.setattr(native, "_library", None)
    requests = mixed(lab, llama)
    lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


@pytest.mark.parametrize("max_step_tokens", [3, 7, 16, 20])
def test_chunks_of_prompts(lab: Any, llama: Path, max_step_tokens: int) -> None:
    requests = mixed(lab, llama)
    outputs = lab.serve(lab.engine(llama, max_step_tokens=max_step_tokens), requests)
    lab.compare(llama, requests, outputs).assert_equal()


@pytest.mark.parametrize("page_size", [4, 16])
def test_preempted_requests_go_on_as_if_nothing_had_happened(lab: Any, llama: Path, page_size: int) -> None:
    requests = mixed(lab, llama, max_tokens=30)
    settings = {"page_size": page_size, "kv_cache_bytes": 160 * 256, "max_model_len": 80}
    engine = lab.engine(llama, **settings)
    outputs = lab.serve(engine, requests)
    assert engine.step().stats.preemptions > 0
    lab.compare(llama, requests, outputs).assert_equal()


def test_steps_that_are_launched_ahead(lab: Any, llama: Path) -> None:
    requests = mixed(lab, llama)
    outputs = lab.serve(lab.engine(llama, look_ahead=True), requests)
    lab.compare(llama, requests, outputs).assert_equal()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_soft_prompt_is_computed_with_the_lora_and_shared_by_those_who_have_both(lab: Any, name: str) -> None:
    path = lab.model(name)
    soft, used = lab.adapter(path, "prompt_tuning", 20), [lab.lora(path, seed=seed) for seed in (0, 1)]
    first = with_loras(lab.requests([soft] * 3), [None, *used])
    second = with_loras(lab.requests([soft] * 3, seed=1), [used[1], None, used[0]])
    engine = lab.engine(path)
    for requests, cached in ((first, 0), (second, 20)):
        outputs = lab.serve(engine, requests)
        assert [own[0].cached_tokens for own in outputs] == [cached] * 3
        lab.compare(path, requests, outputs).assert_equal()


def test_one_text_shares_pages_under_one_lora_only(lab: Any, llama: Path) -> None:
    used = loras(lab, llama, 3)
    [request] = lab.requests([None], length=40)
    requests = [replace(request, lora=lora) for lora in (None, *used)]
    engine = lab.engine(llama)
    for order, cached in ((requests, 0), (requests[::-1], 32)):
        for each in order:
            [outputs] = lab.serve(engine, [each])
            assert outputs[0].cached_tokens == cached
            lab.compare(llama, [each], [outputs]).assert_equal()


def test_a_slot_is_used_again_while_others_run(lab: Any, llama: Path) -> None:
    """Two places for five LoRAs that come and go, and the second stays all the time."""
    used = loras(lab, llama, 5)
    engine = lab.engine(llama, max_loras=2)
    for i in (0, 2, 3, 4, 0):
        requests = with_loras(lab.requests([None] * 3), [used[i], used[1], None])
        lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()
        engine.handle(DropAdapter(digest=used[i].load.digest))


def test_the_default_model(lab: Any) -> None:
    try:
        path = resolve_model(DEFAULT_MODEL)
    except ModelSourceError as error:
        pytest.skip(str(error))
    # Deep and trained: random weights are small enough to leave it a language model.
    used = [lab.lora(path, seed=seed, lora_alpha=1, targets=["q_proj", "v_proj", "down_proj"]) for seed in (0, 1)]
    soft = lab.adapter(path, "text_prompt", 20)
    requests = with_loras(
        lab.requests([None, None, soft, None, None], length=20, max_tokens=8), [*used, used[0], None, used[1]]
    )
    outputs = lab.serve(lab.engine(path, kv_cache_bytes=64 * 2**20), requests)
    lab.compare(path, requests, outputs).assert_equal()


def test_the_oracle_tells_all_requests_apart(lab: Any, llama: Path) -> None:
    soft = lab.adapter(llama, "prompt_tuning", 20)
    [request] = lab.requests([None])
    requests = [
        replace(request, lora=lora, adapter=adapter)
        for lora in (None, *loras(lab, llama, 3))
        for adapter in (None, soft)
    ]
    answers = [lab.oracle(llama).greedy(each) for each in requests]
    assert len(set(map(tuple, answers))) == len(answers)
    assert all(map(lab.oracle(llama).check, requests, answers))


# From here on something is broken on purpose: the comparison must notice.


def test_a_scale_that_is_off_by_a_hundredth_is_noticed(lab: Any, llama: Path) -> None:
    requests = with_loras(lab.requests([None] * 4), loras(lab, llama, 4))
    louder = []
    for request in requests:
        load = request.lora.load
        modules = [replace(module, scale=module.scale * 1.01) for module in load.modules]
        louder.append(replace(request, lora=replace(request.lora, load=replace(load, modules=modules))))
    comparison = lab.compare(llama, requests, lab.serve(lab.engine(llama), louder))
    assert {problem.split(":")[0] for problem in comparison.problems} == {f"request {i}" for i in range(4)}


def test_swapped_loras_are_noticed(lab: Any, llama: Path) -> None:
    requests = with_loras(lab.requests([None] * 2), [lab.lora(llama, seed=seed) for seed in (0, 1)])
    swapped = with_loras(requests, [request.lora for request in reversed(requests)])
    comparison = lab.compare(llama, requests, lab.serve(lab.engine(llama), swapped))
    assert {problem.split(":")[0] for problem in comparison.problems} == {"request 0", "request 1"}


def test_pages_of_the_base_model_under_a_lora_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_module, "under_lora", lambda key, _: key)
    [request] = lab.requests([None], length=40)
    engine = lab.engine(llama)
    lab.serve(engine, [request])
    [under_lora] = with_loras([request], [lab.lora(llama)])
    assert lab.compare(llama, [under_lora], lab.serve(engine, [under_lora])).problems


def test_virtual_tokens_that_pass_the_lora_by_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = with_loras(lab.requests([lab.adapter(llama, "prompt_tuning", 20)]), [lab.lora(llama)])
    engine = lab.engine(llama)

    def without_virtual(slots: list[int], device: Any) -> Any:
        return build_tiles([-1] * 20 + slots[20:] if len(slots) > 20 else slots, device)

    monkeypatch.setattr(runner_module, "build_tiles", without_virtual)
    assert lab.compare(llama, requests, lab.serve(engine, requests)).problems


def test_a_linear_without_its_lora_is_noticed(lab: Any, llama: Path) -> None:
    [request] = with_loras(lab.requests([None]), [lab.lora(llama)])
    load = request.lora.load
    for missing in ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj"):
        modules = [module for module in load.modules if not module.name.endswith(missing)]
        assert len(modules) == len(load.modules) - 1
        less = replace(request, lora=replace(request.lora, load=replace(load, modules=modules)))
        assert lab.compare(llama, [request], lab.serve(lab.engine(llama), [less])).problems
