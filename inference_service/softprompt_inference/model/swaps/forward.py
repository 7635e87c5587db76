"""Another forward for one module, put over its class's own and taken off again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from softprompt_inference.model.swaps.verify import Swap

_MISSING = object()


def swap_forward(
    module: nn.Module, forward: Callable[..., Any], *, name: str, run: Callable[[Generator], Tensor]
) -> Swap:
    """A Swap that lets `forward` (without self) answer the module's calls; hooks and parameters stay."""
    covered: list[object] = []

    def apply() -> None:
        covered.append(module.__dict__.get("forward", _MISSING))
        module.__dict__["forward"] = forward

    def undo() -> None:
        previous = covered.pop()
        if previous is _MISSING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous

    return Swap(name=name, apply=apply, undo=undo, run=run)


def together(parts: Sequence[Swap], *, name: str, run: Callable[[Generator], Tensor]) -> Swap:
    """Swaps of which all are kept, or none."""

    def apply() -> None:
        for part in parts:
            part.apply()

    def undo() -> None:
        for part in reversed(parts):
            part.undo()

    return Swap(name=name, apply=apply, undo=undo, run=run)


def run_hooked(run: Callable[[], object], hooks: Sequence[RemovableHandle]) -> None:
    """Run a model with hooks on its modules, and take them off again."""
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


def random_like(like: Tensor, *shape: int, generator: Generator) -> Tensor:
    """Normal values of that shape, with the dtype and device of `like`; the same values on any device."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(like)
