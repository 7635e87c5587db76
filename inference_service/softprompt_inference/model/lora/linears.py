"""The linears of a model that a LoRA may change, and where each of them is computed once swaps have been made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softprompt_inference.model.swaps.forward import run_hooked
from softprompt_inference.model.swaps.gated import GatedMLP
from softprompt_inference.model.swaps.linears import MergedLinear, linears_of, weight_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear under the name that adapters know it by, a dotted path in the model as it was loaded."""

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A module that computes one linear, or several that read the same input.

    Attributes:
        linears: side by side in this order, or gate and up of a `NativeGate`.
    """

    module: nn.Module
    linears: tuple[Linear, ...]


def find_linears(
    model: nn.Module, head: nn.Module | None, run: Callable[[], object], *, num_tokens: int
) -> list[Linear]:
    """The linears that see every token of a step once, in the step's order; to be called before any swap.

    Left out are the head, and others that see only tokens whose logits are wanted, and those whose input has lost
    its shape [1, T, in]: a mixture of experts deals tokens out among them.

    Args:
        run: runs the model once on so many tokens, for the logits of fewer where it can do that.
    """
    calls: dict[str, list[tuple[int, ...]]] = {}
    places = [place for place in linears_of(model) if place.module is not head]

    def note(name: str, x: Tensor) -> None:
        calls.setdefault(name, []).append(tuple(x.shape))

    hooks = [
        place.module.register_forward_pre_hook(lambda _, args, name=place.name: note(name, args[0]))
        for place in places
    ]
    run_hooked(run, hooks)
    found = []
    for place in places:
        match calls.get(place.name):
            case [(1, seen, in_features)] if seen == num_tokens:
                weight = weight_of(place.module)
                found.append(
                    Linear(name=place.name, in_features=in_features, out_features=len(weight), dtype=weight.dtype)
                )
    return found


def find_products(model: nn.Module, linears: list[Linear]) -> list[Product]:
    """Where the linears are computed now."""
    parts: dict[int, tuple[nn.Module, dict[int, Linear]]] = {}
    for linear in linears:
        module, index = _locate(model, linear.name)
        parts.setdefault(id(module), (module, {}))[1][index] = linear
    products = []
    for module, by_index in parts.values():
        assert sorted(by_index) == list(range(len(by_index))), "a part of a merged product is missing"
        products.append(Product(module=module, linears=tuple(by_index[index] for index in range(len(by_index)))))
    return products


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """The module that computes a linear, and the linear's place among those it computes."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, GatedMLP):
        return parent.locate(attribute)
    linear: nn.Module = getattr(parent, attribute)
    return linear.locate() if isinstance(linear, MergedLinear) else (linear, 0)
