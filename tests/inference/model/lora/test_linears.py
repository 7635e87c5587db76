from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.loader import load_model
from softprompt_inference.model.lora.linears import find_linears, find_products
from softprompt_inference.model.swaps.packed import NativeGate
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Linears of one layer of the tiny models, with what they read and write.
LINEARS = {
    "llama": {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 16),
        "self_attn.v_proj": (32, 16),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (32, 64),
        "mlp.up_proj": (32, 64),
        "mlp.down_proj": (64, 32),
    },
    "phi3": {
        "self_attn.qkv_proj": (32, 64),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_up_proj": (32, 128),
        "mlp.down_proj": (64, 32),
    },
    "gpt2": {
        "attn.c_attn": (32, 96),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (32, 128),
        "mlp.c_proj": (128, 32),
    },
}
PREFIX = {"llama": "model.layers", "phi3": "model.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_of_every_layer_is_found_and_the_head_is_not(lab: Any, name: str, dtype: torch.dtype) -> None:
    config = EngineConfig(model_path=str(lab.model(name)), device="cpu", dtype=str(dtype).removeprefix("torch."))
    loaded = load_model(config, lambda _: None)
    found = {linear.name: (linear.in_features, linear.out_features) for linear in loaded.linears}
    assert found == {
        f"{PREFIX[name]}.{layer}.{linear}": shape for layer in (0, 1) for linear, shape in LINEARS[name].items()
    }
    assert {linear.dtype for linear in loaded.linears} == {dtype}
    products = find_products(loaded.model, loaded.linears)
    assert sorted(linear.name for product in products for linear in product.linears) == sorted(found)
    for product in products:
        x = torch.randn(1, 3, product.linears[0].in_features).to(dtype)
        with torch.inference_mode():
            answer = product.module(x)
        widths = [linear.out_features for linear in product.linears]
        if isinstance(product.module, NativeGate):
            assert answer.shape == (1, 3, *set(widths))
        else:
            assert answer.shape == (1, 3, sum(widths))


class Experts(nn.Module):
    """Deals tokens out among two linears, has one that it calls twice and one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(4, 4)
        self.dealt = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.conv = Conv1D(6, 4)
        self.head = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.all(x)
        first, second = (expert(part) for expert, part in zip(self.dealt, x[0].split(2), strict=True))
        x = torch.cat([second, first])[None]
        return self.head(self.conv(self.twice(self.twice(x))))  # type: ignore[no-any-return]


def test_linears_that_do_not_see_every_token_once_in_its_place_are_left_out() -> None:
    model = Experts()
    found = find_linears(model, model.head, lambda: model(torch.randn(1, 4, 4)), num_tokens=4)
    assert [(linear.name, linear.in_features, linear.out_features) for linear in found] == [
        ("all", 4, 4),
        ("conv", 4, 6),
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())
