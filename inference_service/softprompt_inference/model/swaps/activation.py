"""The gate of a gated MLP in one pass: activation and product together, on a GPU.

Found by their parts: a gate and an up projection, or both merged in one (Phi-3), an activation and a down
projection. Which activation it is is decided by its values.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from softprompt_kernels.act_mul import ACTIVATIONS, act_mul
from torch import Generator, Tensor, nn

from softprompt_inference.model.swaps.forward import random_like, swap_forward
from softprompt_inference.model.swaps.verify import Swap, small_and_large

_NUM_TOKENS = 3
# In float32, where exact and approximate GELU are a hundred times further apart.
_SAME_VALUES = 2e-6


@torch.inference_mode()
def find(model: nn.Module, *, everywhere: bool = False) -> list[Swap]:
    """The gated MLPs. To be called before their projections are replaced, which tell the size of their input.

    Args:
        everywhere: on a CPU too, where nothing is gained.
    """
    swaps = []
    for name, module in model.named_modules():
        activation = _recognise_activation(module)
        forward = _make_forward(module, activation) if activation is not None else None
        like = next(module.parameters(), None)
        if forward is None or like is None or not (everywhere or like.device.type == "cuda"):
            continue
        if len(inspect.signature(module.forward).parameters) == 1:
            swaps.append(_swap(name, module, forward, like))
    return swaps


def _recognise_activation(module: nn.Module) -> str | None:
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    x = torch.linspace(-6, 6, 257)
    try:
        answer = function(x)
    except (RuntimeError, TypeError):
        return None
    for name, activation in ACTIVATIONS.items():
        if isinstance(answer, Tensor) and torch.allclose(answer, activation(x), rtol=0, atol=_SAME_VALUES):
            return name
    return None


def _make_forward(module: Any, activation: str) -> Callable[[Tensor], Tensor] | None:
    def has(*names: str) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Module) for name in names)

    def forward_separate(x: Tensor) -> Tensor:
        return module.down_proj(act_mul(module.gate_proj(x), module.up_proj(x), activation))  # type: ignore[no-any-return]

    def forward_merged(x: Tensor) -> Tensor:
        gate, up = module.gate_up_proj(x).chunk(2, -1)
        return module.down_proj(act_mul(gate, up, activation))  # type: ignore[no-any-return]

    if has("gate_proj", "up_proj", "down_proj"):
        return forward_separate
    return forward_merged if has("gate_up_proj", "down_proj") else None


def _swap(name: str, module: Any, forward: Callable[[Tensor], Tensor], like: Tensor) -> Swap:
    first = module.gate_proj if hasattr(module, "gate_proj") else module.gate_up_proj
    size = int(first.in_features)

    def run(generator: Generator) -> Tensor:
        return small_and_large(module, random_like(like, 1, _NUM_TOKENS, size, generator=generator))

    return swap_forward(module, forward, name=f"activation {name}", run=run)
