from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.loader import load_model
from softprompt_inference.model.lora.context import LoraContext
from softprompt_inference.model.swaps import gated
from softprompt_inference.model.swaps.gated import GatedMLP
from softprompt_inference.model.swaps.packed import can_pack
from softprompt_inference.model.swaps.verify import relative_error, verify
from softprompt_kernels import native
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP


def _mlp(activation: str, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation, mlp_bias=bias)
    return nn.Sequential(LlamaMLP(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_an_mlp_answers_as_before(activation: str, bias: bool, dtype: torch.dtype) -> None:
    model = _mlp(activation, bias=bias, dtype=dtype)
    if not can_pack(model[0].up_proj.weight):
        pytest.skip("this processor has no packed products in bfloat16")
    x = torch.randn(1, 7, 32).to(dtype)
    with torch.inference_mode():
        expected = model(x)
        (swap,) = gated.find(model, LoraContext())
        assert verify(swap)
        assert isinstance(model[0], GatedMLP)
        assert relative_error(model(x), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_apart_are_what_the_linears_were(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_library", None)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=41, mlp_bias=bias)
    original = LlamaMLP(config).to(dtype)
    if not can_pack(original.up_proj.weight):
        pytest.skip("this processor has no packed products in bfloat16")
    x = torch.randn(1, 7, 32).to(dtype)
    with torch.inference_mode():
        mlp = GatedMLP(original, LoraContext())
        for name in ("gate_proj", "up_proj"):
            module, index = mlp.locate(name)
            expected = getattr(original, name)(x)
            assert relative_error(module(x).chunk(2, -1)[index], expected) < (
                1e-6 if dtype == torch.float32 else 1e-2
            )
        assert relative_error(mlp.forward_apart(x), original(x)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_an_mlp_whose_parts_apart_are_wrong_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mlp("silu")
    original = model[0]
    apart = gated.PackedGate.forward_apart
    monkeypatch.setattr(gated.PackedGate, "forward_apart", lambda self, x: apart(self, x).roll(1, -1))
    (swap,) = gated.find(model, LoraContext())
    assert not verify(swap)
    assert model[0] is original


def test_another_activation_or_another_child_is_left_alone() -> None:
    assert gated.find(_mlp("relu"), LoraContext()) == []
    model = _mlp("silu")
    model[0].dropout = nn.Dropout()
    assert gated.find(model, LoraContext()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_that_limits_large_values_is_undone(dtype: torch.dtype) -> None:
    class Limited(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up = self.up_proj(x).clamp(-10, 10)
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * up)  # type: ignore[no-any-return]

    model = _mlp("silu", dtype=dtype)
    model[0].__class__ = Limited
    original = model[0]
    if not can_pack(original.up_proj.weight):
        pytest.skip("this processor has no packed products in bfloat16")
    (swap,) = gated.find(model, LoraContext())
    assert not verify(swap)
    assert model[0] is original


def test_an_mlp_that_does_something_else_is_undone() -> None:
    class Odd(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = nn.Sequential(Odd(LlamaConfig(hidden_size=32, intermediate_size=48)))
    original = model[0]
    (swap,) = gated.find(model, LoraContext())
    assert not verify(swap)
    assert model[0] is original


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2"])
def test_the_mlps_of_real_architectures_are_found(lab: Any, kind: str) -> None:
    loaded = load_model(EngineConfig(model_path=str(lab.model(kind)), device="cpu"), lambda _: None)
    found = [module for module in loaded.model.modules() if isinstance(module, GatedMLP)]
    assert len(found) == len(loaded.layers)
