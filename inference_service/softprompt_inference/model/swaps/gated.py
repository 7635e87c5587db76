"""Gated MLPs on CPUs: act(gate(x)) * up(x) without a pass of its own."""

from functools import partial

from softprompt_kernels import native
from torch import Generator, Tensor, nn
from transformers.activations import ACT2FN

from softprompt_inference.model.swaps.linears import Place, places
from softprompt_inference.model.swaps.packed import NativeGate, PackedLinear, can_pack, pack
from softprompt_inference.model.swaps.verify import Swap, random_input

_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# transformers' activations → our kernels' name, and oneDNN's name and algorithm; what is listed wrongly would fail
# its verification.
_ACTIVATIONS = {
    type(ACT2FN["silu"]): ("silu", "swish", ""),
    type(ACT2FN["gelu_pytorch_tanh"]): ("gelu_tanh", "gelu", "tanh"),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over packed weights."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.product = _gate(mlp.gate_proj, mlp.up_proj, mlp.act_fn)  # type: ignore[arg-type]
        self.down = pack(mlp.down_proj.weight, mlp.down_proj.bias)  # type: ignore[arg-type,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → [..., hidden]"""
        out: Tensor = self.down(self.product(x))
        return out


class PackedGate(nn.Module):
    """act(gate(x)) * up(x) as two of oneDNN's products that each do their part of it in the same pass."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, activation: str, algorithm: str) -> None:
        super().__init__()
        self.gate = PackedLinear(gate.weight, gate.bias, activation=activation, algorithm=algorithm)
        self.up = PackedLinear(up.weight, up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        return self.up.forward_times(x, self.gate(x))


def find(model: nn.Module) -> list[Swap]:
    """Every module that is a gated MLP by the names of its children and has weights that can be packed."""
    return [_swap(place) for place in places(model, _is_gated_mlp)]


def _is_gated_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if set(children) != _CHILDREN or type(children["act_fn"]) not in _ACTIVATIONS:
        return False
    linears = [children[name] for name in ("gate_proj", "up_proj", "down_proj")]
    return all(type(linear) is nn.Linear and can_pack(linear.weight) for linear in linears)


def _gate(gate: nn.Linear, up: nn.Linear, function: nn.Module) -> nn.Module:
    ours, activation, algorithm = _ACTIVATIONS[type(function)]
    if native.supports_linear(gate.weight) and (gate.bias is None) == (up.bias is None):
        return NativeGate(gate, up, ours)
    return PackedGate(gate, up, activation, algorithm)


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
