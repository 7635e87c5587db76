"""Gated MLPs on CPUs: act(gate(x)) * up(x) as two products that each do their part of it in the same pass."""

from functools import partial

from torch import Generator, Tensor, nn
from transformers.activations import ACT2FN

from softprompt_inference.model.swaps.linears import Place, places
from softprompt_inference.model.swaps.packed import PackedLinear, can_pack
from softprompt_inference.model.swaps.verify import Swap, random_input

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# transformers' activations → oneDNN's name and algorithm; what is listed wrongly would fail its verification.
_ACTIVATIONS = {
    type(ACT2FN["silu"]): ("swish", ""),
    type(ACT2FN["gelu_pytorch_tanh"]): ("gelu", "tanh"),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over packed weights."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        activation, algorithm = _ACTIVATIONS[type(mlp.act_fn)]
        self.gate = _pack(mlp.gate_proj, activation, algorithm)  # type: ignore[arg-type]
        self.up = _pack(mlp.up_proj)  # type: ignore[arg-type]
        self.down = _pack(mlp.down_proj)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → [..., hidden]"""
        out: Tensor = self.down(self.up.forward_times(x, self.gate(x)))
        return out


def find(model: nn.Module) -> list[Swap]:
    """Every module that is a gated MLP by the names of its children and has weights that can be packed."""
    return [_swap(place) for place in places(model, _is_gated_mlp)]


def _is_gated_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(children["act_fn"]) not in _ACTIVATIONS:
        return False
    linears = [children[name] for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(linear) is nn.Linear and can_pack(linear.weight) for linear in linears)


def _pack(linear: nn.Linear, activation: str = "none", algorithm: str = "") -> PackedLinear:
    return PackedLinear(linear.weight, linear.bias, activation=activation, algorithm=algorithm)


def _swap(place: Place) -> Swap:
    weight: Tensor = place.module.gate_proj.weight  # type: ignore[union-attr,assignment]

    def run(generator: Generator) -> Tensor:
        answer: Tensor = place.current(random_input(generator, weight.shape[1], weight))
        return answer

    return Swap(
        name=place.name,
        apply=lambda: place.put(GatedMLP(place.module)),
        undo=partial(place.put, place.module),
        run=run,
    )
