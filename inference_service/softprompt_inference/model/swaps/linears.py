"""Linear layers: packed for CPUs, and merged where several read the same input (q/k/v, gate/up)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from softprompt_inference.model.swaps.forward import run_hooked
from softprompt_inference.model.swaps.packed import can_pack, pack, trace_of
from softprompt_inference.model.swaps.verify import Swap, random_input


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a module hangs in a model."""

    parent: nn.Module
    attribute: str
    name: str
    module: nn.Module

    @property
    def current(self) -> nn.Module:
        """What hangs there now."""
        return getattr(self.parent, self.attribute)  # type: ignore[no-any-return]

    def put(self, module: nn.Module) -> None:
        """Hang another module there."""
        setattr(self.parent, self.attribute, module)


def find(model: nn.Module, run: Callable[[], object]) -> list[Swap]:
    """Every linear that can be merged with its neighbours or packed.

    Args:
        run: runs the model once on a few tokens, so that it shows which linears read the same input.
    """
    swaps = []
    for places in _shared_inputs(linears_of(model), run):
        weights = [weight_of(place.module) for place in places]
        if len(places) > 1:
            replacements = partial(_merged, [place.module for place in places])
        elif can_pack(weights[0]):
            replacements = partial(_packed, places[0].module)
        else:
            continue
        swaps.append(_swap(places, replacements))
    return swaps


def places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Place]:
    """The modules that are wanted and hang in one place only."""
    seen: dict[int, list[Place]] = {}
    for prefix, parent in model.named_modules():
        for attribute, module in parent.named_children():
            if wanted(module):
                name = f"{prefix}.{attribute}".lstrip(".")
                place = Place(parent=parent, attribute=attribute, name=name, module=module)
                seen.setdefault(id(module), []).append(place)
    return [found[0] for found in seen.values() if len(found) == 1]


def linears_of(model: nn.Module) -> list[Place]:
    """The plain linears."""
    # Exactly these classes: one derived from them computes something else.
    return places(model, lambda module: type(module) in (nn.Linear, Conv1D))


def _shared_inputs(linears: list[Place], run: Callable[[], object]) -> list[list[Place]]:
    """The linears in the order of their calls; together those of one parent that are given the same tensor."""
    calls: list[tuple[Place, Tensor]] = []
    hooks = [
        place.module.register_forward_pre_hook(lambda _, args, place=place: calls.append((place, args[0])))
        for place in linears
    ]
    run_hooked(run, hooks)
    called = [id(place.module) for place, _ in calls]
    once = [(place, x) for place, x in calls if called.count(id(place.module)) == 1]
    groups: list[list[Place]] = []
    for _, members in groupby(once, lambda call: (id(call[0].parent), id(call[1]))):
        group = [place for place, _ in members]
        groups += [group] if _can_merge(group) else [[place] for place in group]
    return groups


def _can_merge(group: Sequence[Place]) -> bool:
    kinds = {(type(p.module), p.module.bias is None, weight_of(p.module).dtype) for p in group}
    return len(kinds) == 1 and type(group[0].module) is nn.Linear


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a plain linear: [out, in]"""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if type(linear) is Conv1D else weight


def _bias(linear: nn.Module) -> Tensor | None:
    return linear.bias  # type: ignore[return-value]


def _packed(linear: nn.Module) -> list[nn.Module]:
    return [pack(weight_of(linear), _bias(linear))]


def _merged(linears: Sequence[nn.Module]) -> list[nn.Module]:
    weight = torch.cat([weight_of(linear) for linear in linears])
    biases = [bias for linear in linears if (bias := _bias(linear)) is not None]
    product = make_linear(weight, torch.cat(biases) if biases else None)
    shared = _SharedProduct(product, [len(weight_of(linear)) for linear in linears])
    return [MergedLinear(shared, index, weight) for index in range(len(linears))]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear with these weights [out, in], packed where that is possible."""
    if can_pack(weight):
        return pack(weight, bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def product_of(linears: Sequence[nn.Module]) -> nn.Module | None:
    """The product whose columns are these linears' results, side by side in this order; None: there is none."""
    merged = [linear for linear in linears if isinstance(linear, MergedLinear)]
    if len(merged) != len(linears) or not merged[0].is_whole(merged):
        return None
    return merged[0].product


class _SharedProduct:
    """One product for several linears; holds its result until each but the first has taken its part."""

    def __init__(self, product: nn.Module, widths: Sequence[int]) -> None:
        self.product = product
        self.widths = list(widths)
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """x [..., in] → the columns of linear `index`: [..., widths[index]]"""
        if x is not self._input or index not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self.product(x).split(self.widths, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part


class MergedLinear(nn.Module):
    """One of several linears that share a product; whoever of them is called first with an input computes it."""

    def __init__(self, shared: _SharedProduct, index: int, weight: Tensor) -> None:
        super().__init__()
        self.weight = trace_of(weight)
        if index == 0:
            self.product = shared.product
        self._shared = shared
        self._index = index

    def is_whole(self, linears: Sequence["MergedLinear"]) -> bool:
        """Whether these are all that share this one's product, in the order of its columns."""
        shared = all(linear._shared is self._shared for linear in linears)
        return shared and [linear._index for linear in linears] == list(range(len(self._shared.widths)))

    def locate(self) -> tuple[nn.Module, int]:
        """The product, and the place of this one's columns among those of the others."""
        return self._shared.product, self._index

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        return self._shared.part(self._index, x)


def _swap(group: Sequence[Place], make: Callable[[], Iterable[nn.Module]]) -> Swap:
    def apply() -> None:
        for place, module in zip(group, make(), strict=True):
            place.put(module)

    def undo() -> None:
        for place in group:
            place.put(place.module)

    weight = weight_of(group[0].module)

    def run(generator: Generator) -> Tensor:
        x = random_input(generator, weight.shape[1], weight)
        return torch.cat([place.current(x) for place in group], dim=-1)

    return Swap(name=" + ".join(place.name for place in group), apply=apply, undo=undo, run=run)
