from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_inference.model.swaps import rotary
from softprompt_inference.model.swaps.verify import verify
from softprompt_kernels import native
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


HALF_SPLIT = [("llama", 2), ("mistral", 2), ("qwen3", 2), ("gemma2", 4), ("phi3", 2), ("gpt_neox", 2)]


# GPT-OSS has tables of half the size, GPT-2 and OPT have learned positions.
@pytest.mark.parametrize(("name", "num_swaps"), [*HALF_SPLIT, ("gpt_oss", 0), ("gpt2", 0), ("opt", 0)])
def test_real_models_compute_the_same_after_it(lab: Any, name: str, num_swaps: int) -> None:
    model = load(lab.model(name))
    expected = logits(model)
    swaps = rotary.find(model, everywhere=True)
    assert len(swaps) == num_swaps
    assert all(verify(swap) for swap in swaps)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for swap in swaps:
        swap.undo()
    assert torch.equal(logits(model), expected)


def test_nothing_is_gained_on_a_cpu_without_native_kernels(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    assert rotary.find(load(llama)) == []


def test_the_replacement_is_called_and_other_models_are_not_touched(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    rope = rotary.rope
    monkeypatch.setattr(rotary, "rope", lambda *tensors: calls.append(tensors) or rope(*tensors))
    model, other = load(llama), load(llama)
    for swap in rotary.find(model, everywhere=True):
        swap.apply()
    calls.clear()
    logits(other)
    assert calls == []
    logits(model)
    assert len(calls) == 2


def test_a_batch_or_tables_of_another_shape_go_the_originals_way(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = rotary._make_rotary(modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(rotary, "rope", None)
    q, k, cos, sin = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for actual, answer in zip(replaced(q, k, cos, sin), expected, strict=True):
        assert torch.equal(actual, answer)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for actual, answer in zip(replaced(q, k, cos, sin, unsqueeze_dim=2), expected, strict=True):
        assert torch.equal(actual, answer)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Interleaved: pairs of neighbours."""
    q_out, k_out = (
        x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None] for x in (q, k)
    )
    return q_out, k_out


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_another_layout_is_left_alone() -> None:
    assert rotary.find(nn.Sequential(Interleaved()), everywhere=True) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_swaps_verify_on_a_gpu(lab: Any, llama: Path, dtype: torch.dtype) -> None:
    swaps = rotary.find(load(llama, dtype).cuda())
    assert len(swaps) == 2
    assert all(verify(swap) for swap in swaps)
