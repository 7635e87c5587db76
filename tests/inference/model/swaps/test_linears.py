from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.swaps import linears
from softprompt_inference.model.swaps.linears import MergedLinear
from softprompt_inference.model.swaps.packed import PackedLinear
from softprompt_inference.model.swaps.verify import verify
from torch import nn
from transformers.pytorch_utils import Conv1D


def _load(lab: Any, kind: str) -> LoadedModel:
    return load_model(EngineConfig(model_path=str(lab.model(kind)), device="cpu"), lambda _: None)


class _Attention(nn.Module):
    """Three linears of one input and one of another; `tied` stands in two places."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(16, 12, bias=bias)
        self.k = nn.Linear(16, 4, bias=bias)
        self.v = nn.Linear(16, 8, bias=bias)
        self.out = nn.Linear(8, 16, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(v) + q.sum() * k.sum()


@pytest.mark.parametrize("bias", [False, True])
def test_linears_of_one_input_become_one_product(bias: bool) -> None:
    model = nn.Sequential(_Attention(bias))
    x = torch.randn(1, 5, 16)
    with torch.inference_mode():
        expected = model(x)
        swaps = linears.find(model, lambda: model(x))
        assert [swap.name for swap in swaps] == ["0.q + 0.k + 0.v", "0.out"]
        assert all(verify(swap) for swap in swaps)
        products = []
        model[0].q.product.register_forward_hook(lambda *_: products.append(1))
        torch.testing.assert_close(model(x), expected)
    assert len(products) == 1
    assert [type(getattr(model[0], name)) for name in "qkv"] == [MergedLinear] * 3


def test_a_merged_linear_answers_to_any_input_in_any_order() -> None:
    attention = _Attention(bias=True)
    x, y = torch.randn(2, 1, 5, 16)
    with torch.inference_mode():
        expected = [attention.v(x), attention.q(y), attention.q(x), attention.q(x), attention.k(y)]
        (merged, *_) = linears.find(nn.Sequential(attention), lambda: attention(x))
        assert verify(merged)
        actual = [attention.v(x), attention.q(y), attention.q(x), attention.q(x), attention.k(y)]
    torch.testing.assert_close(actual, expected)


def test_a_step_leaves_no_tensor_behind() -> None:
    attention = _Attention(bias=False)
    with torch.inference_mode():
        (merged, *_) = linears.find(nn.Sequential(attention), lambda: attention(torch.randn(1, 2, 16)))
        assert verify(merged)
        attention(torch.randn(1, 5, 16))
    shared = attention.q._shared
    assert shared._input is None
    assert shared._parts == {}


def test_conv1d_is_packed_and_a_derived_class_is_not() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Conv1D(6, 4), Odd(6, 6))
    x = torch.randn(1, 3, 4)
    with torch.inference_mode():
        expected = model(x)
        assert [verify(swap) for swap in linears.find(model, lambda: model(x))] == [True]
        torch.testing.assert_close(model(x), expected)
    assert [type(module) for module in model] == [PackedLinear, Odd]


def test_a_module_in_two_places_or_called_twice_is_left_alone() -> None:
    shared = nn.Linear(4, 4)
    both = nn.Sequential(shared, nn.ReLU(), shared)
    assert linears.find(both, lambda: both(torch.randn(1, 4))) == []
    single = nn.Sequential(nn.Linear(4, 4))
    twice = linears.find(single, lambda: single(single(torch.randn(1, 4))))
    assert twice == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi3", "opt"])
def test_no_plain_linear_is_left_in_a_model(lab: Any, kind: str) -> None:
    model = _load(lab, kind).model
    left = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    assert left == []
