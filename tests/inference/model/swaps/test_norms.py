from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_inference.model.swaps import norms
from softprompt_inference.model.swaps.verify import Swap, verify
from softprompt_kernels import native
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class PlainRMSNorm(nn.Module):
    def __init__(self, size: int, *, unit_offset: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype))
        self.unit_offset = unit_offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float() + 1 if self.unit_offset else self.weight.float()
        return (x * weight).to(hidden_states.dtype)


class OtherRMSNorm(PlainRMSNorm):
    """Named like one, but it subtracts the mean."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits


def vary_norms(model: Any) -> None:
    """As they are loaded, the weights are all ones or zeros."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.weight.data += torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2


def names(swaps: list[Swap]) -> list[str]:
    return [swap.name for swap in swaps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_both_kinds_of_weight_are_told_apart(unit_offset: bool, dtype: torch.dtype) -> None:
    norm = PlainRMSNorm(48, unit_offset=unit_offset, dtype=dtype)
    [swap] = norms.find(nn.Sequential(norm))
    assert verify(swap)
    assert "forward" in vars(norm)
    x = torch.randn(2, 5, 3, 48).to(dtype)
    torch.testing.assert_close(norm(x), PlainRMSNorm.forward(norm, x))


def test_what_computes_something_else_is_left_alone() -> None:
    bare = PlainRMSNorm(8)
    bare.weight = None
    assert norms.find(nn.Sequential(OtherRMSNorm(8), nn.LayerNorm(8), bare)) == []


def test_undoing_leaves_no_trace() -> None:
    norm = PlainRMSNorm(8)
    [swap] = norms.find(nn.Sequential(norm))
    swap.apply()
    swap.undo()
    assert "forward" not in vars(norm)


def test_inputs_of_another_dtype_go_the_originals_way() -> None:
    norm = PlainRMSNorm(8)
    x = torch.randn(1, 3, 8).bfloat16()
    expected = norm(x)
    [swap] = norms.find(nn.Sequential(norm))
    swap.apply()
    assert torch.equal(norm(x), expected)


# Two norms in each of two layers, four in each of Gemma 2's four, two more per layer for Qwen 3's heads; one last.
@pytest.mark.parametrize(
    ("name", "num_norms", "num_layers"),
    [("llama", 5, 2), ("mistral", 5, 2), ("phi3", 5, 2), ("qwen3", 9, 2), ("gemma2", 17, 0), ("gpt2", 0, 0)],
)
def test_real_models_compute_the_same_after_it(lab: Any, name: str, num_norms: int, num_layers: int) -> None:
    model = load(lab.model(name))
    vary_norms(model)
    expected = logits(model)
    swaps = norms.find(model, everywhere=True)
    assert sum(name.startswith("rmsnorm ") for name in names(swaps)) == num_norms
    assert sum(name.startswith("residual ") for name in names(swaps)) == num_layers
    assert all(verify(swap) for swap in swaps)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for swap in reversed(swaps):
        swap.undo()
    assert torch.equal(logits(model), expected)


def test_a_sum_with_its_norm_is_no_gain_on_a_cpu_without_native_kernels(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    assert all(name.startswith("rmsnorm ") for name in names(norms.find(load(llama))))


def test_a_layer_that_scales_its_residual_is_left_alone(lab: Any, llama: Path) -> None:
    model = load(llama)
    layer = model.model.layers[1]
    attend = type(layer).forward

    def scaled(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return attend(self, hidden_states, **kwargs) * 1.5

    layer.forward = scaled.__get__(layer)
    layers = [name for name in names(norms.find(model, everywhere=True)) if name.startswith("residual")]
    assert layers == ["residual and rmsnorm model.layers.0"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_all_swaps_verify_on_a_gpu(lab: Any, name: str, dtype: torch.dtype) -> None:
    swaps = norms.find(load(lab.model(name), dtype).cuda())
    assert swaps
    assert all(verify(swap) for swap in swaps)
