from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from softprompt_inference.model.swaps import activation
from softprompt_inference.model.swaps.verify import verify
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class MLP(nn.Module):
    def __init__(self, act_fn: Any, *, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = act_fn
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


# GPT-OSS has experts, the last two have no gate.
@pytest.mark.parametrize(
    ("name", "num_swaps"),
    [
        ("llama", 2),
        ("qwen3", 2),
        ("gemma2", 4),
        ("phi3", 2),
        ("gpt_oss", 0),
        ("gpt2", 0),
        ("opt", 0),
        ("gpt_neox", 0),
    ],
)
def test_real_models_compute_the_same_after_it(lab: Any, name: str, num_swaps: int) -> None:
    model = load(lab.model(name))
    expected = logits(model)
    swaps = activation.find(model, everywhere=True)
    assert len(swaps) == num_swaps
    assert all(verify(swap) for swap in swaps)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for swap in swaps:
        swap.undo()
    assert torch.equal(logits(model), expected)


def test_nothing_is_gained_on_a_cpu(lab: Any, llama: Path) -> None:
    assert activation.find(load(llama)) == []


@pytest.mark.parametrize(
    "act_fn", [nn.SiLU(), F.silu, nn.GELU(approximate="tanh")], ids=["SiLU", "silu", "GELU(tanh)"]
)
def test_activations_are_known_by_their_values(act_fn: Any) -> None:
    [swap] = activation.find(nn.Sequential(MLP(act_fn)), everywhere=True)
    assert verify(swap)


@pytest.mark.parametrize("act_fn", [nn.GELU(), nn.ReLU(), "silu", nn.Bilinear(1, 1, 1)], ids=str)
def test_other_activations_are_left_alone(act_fn: Any) -> None:
    assert activation.find(nn.Sequential(MLP(act_fn)), everywhere=True) == []


def test_an_mlp_that_does_more_is_undone() -> None:
    mlp = MLP(nn.SiLU(), scale=1.1)
    [swap] = activation.find(nn.Sequential(mlp), everywhere=True)
    assert not verify(swap)
    assert "forward" not in vars(mlp)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_all_swaps_verify_on_a_gpu(lab: Any, name: str, dtype: torch.dtype) -> None:
    swaps = activation.find(load(lab.model(name), dtype).cuda())
    assert swaps
    assert all(verify(swap) for swap in swaps)
