"""Gated MLPs on CPUs: act(gate(x)) * up(x) without a pass of its own.

A LoRA changes gate(x) and up(x) themselves. Our kernels add it within their pass; with other products, a step that
has one for them computes both, and then their gate.
"""

from functools import partial
from typing import Any

import torch
from softprompt_kernels.act_mul import act_mul
from torch import Generator, Tensor, nn
from transformers.activations import ACT2FN

from softprompt_inference.model.lora.context import LoraContext, is_attached
from softprompt_inference.model.swaps.linears import Place, places
from softprompt_inference.model.swaps.packed import NativeGate, PackedLinear, can_pack, is_native, pack
from softprompt_inference.model.swaps.verify import Swap, random_input, small_and_large

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# transformers' activations → our kernels' name, and oneDNN's name and algorithm; what is listed wrongly would fail
# its verification.
_ACTIVATIONS = {
    type(ACT2FN["silu"]): ("silu", "swish", ""),
    type(ACT2FN["gelu_pytorch_tanh"]): ("gelu_tanh", "gelu", "tanh"),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over packed weights."""

    def __init__(self, mlp: nn.Module, lora: LoraContext) -> None:
        super().__init__()
        self.product = _gate(mlp.gate_proj, mlp.up_proj, mlp.act_fn)  # type: ignore[arg-type]
        self.apart = _Apart(self.product) if isinstance(self.product, PackedGate) else None
        self.down = pack(mlp.down_proj.weight, mlp.down_proj.bias)  # type: ignore[arg-type,union-attr]
        self._activation, *_ = _ACTIVATIONS[type(mlp.act_fn)]
        self._lora = lora

    def locate(self, attribute: str) -> tuple[nn.Module, int]:
        """The module that computes the linear that had this name, and its place among those it computes."""
        gates = self.apart or self.product
        return {"gate_proj": (gates, 0), "up_proj": (gates, 1), "down_proj": (self.down, 0)}[attribute]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → [..., hidden]"""
        if self._lora.tiles is not None and self.apart is not None and is_attached(self.apart):
            return self.forward_apart(x)
        out: Tensor = self.down(self.product(x))
        return out

    def forward_apart(self, x: Tensor) -> Tensor:
        """The same in two passes, where there is a module for it."""
        assert self.apart is not None
        gate, up = self.apart(x).chunk(2, -1)
        out: Tensor = self.down(act_mul(gate, up, self._activation))
        return out


class _Apart(nn.Module):
    """gate(x) beside up(x), over the weights of a fused product."""

    def __init__(self, product: "PackedGate") -> None:
        super().__init__()
        self._compute = product.forward_apart

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., 2 * out]"""
        return self._compute(x)


class PackedGate(nn.Module):
    """act(gate(x)) * up(x) as two of oneDNN's products that each do their part of it in the same pass."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, activation: str, algorithm: str) -> None:
        super().__init__()
        self.gate = PackedLinear(gate.weight, gate.bias, activation=activation, algorithm=algorithm)
        self.up = PackedLinear(up.weight, up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        return self.up.forward_times(x, self.gate(x))

    def forward_apart(self, x: Tensor) -> Tensor:
        """gate(x) beside up(x), without the activation: x [..., in] → [..., 2 * out]"""
        return torch.cat([self.gate.forward_plain(x), self.up(x)], dim=-1)


def find(model: nn.Module, lora: LoraContext) -> list[Swap]:
    """Every module that is a gated MLP by the names of its children and has weights that can be packed."""
    return [_swap(place, lora) for place in places(model, _is_gated_mlp)]


def _is_gated_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(children["act_fn"]) not in _ACTIVATIONS:
        return False
    linears = [children[name] for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(linear) is nn.Linear and can_pack(linear.weight) for linear in linears)


def _gate(gate: nn.Linear, up: nn.Linear, function: nn.Module) -> NativeGate | PackedGate:
    ours, activation, algorithm = _ACTIVATIONS[type(function)]
    if (gate.bias is None) == (up.bias is None) and is_native(gate.weight) and is_native(up.weight):
        return NativeGate(gate, up, ours)
    return PackedGate(gate, up, activation, algorithm)


def _swap(place: Place, lora: LoraContext) -> Swap:
    weight: Tensor = place.module.gate_proj.weight  # type: ignore[union-attr,assignment]

    def run(generator: Generator) -> Tensor:
        mlp, x = place.current, random_input(generator, weight.shape[1], weight)
        # Both ways to compute it, where there are two, are held to the original.
        has_two = isinstance(mlp, GatedMLP) and mlp.apart is not None
        ways: Any = (mlp, mlp.forward_apart if has_two else mlp)
        return torch.cat([small_and_large(way, x) for way in ways])

    return Swap(
        name=place.name,
        apply=lambda: place.put(GatedMLP(place.module, lora)),
        undo=partial(place.put, place.module),
        run=run,
    )
