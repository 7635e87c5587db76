"""Which LoRA each token of the step that is being computed uses, and how a linear comes to notice."""

from collections.abc import Callable, Sequence

import torch
from softprompt_kernels.lora_tiles import LoraTiles, cut_tiles
from torch import Tensor, nn

from softprompt_inference.model.transfer import upload

# Tokens of one tile on a GPU: as many as a step of decodes fills well, and as many as a prompt does.
_DECODE_TOKENS, _PROMPT_TOKENS = 16, 64


class LoraContext:
    """Holds the step's tiles; None: no token has a LoRA, and everything is computed as if there were none."""

    def __init__(self) -> None:
        self.tiles: LoraTiles | None = None


def build_tiles(slots: Sequence[int], device: torch.device) -> LoraTiles | None:
    """Lay out one step; None where no token has a LoRA.

    Args:
        slots: of each token; −1: none.
    """
    if max(slots) < 0:
        return None
    if device.type == "cpu":
        max_tokens = len(slots)  # each LoRA of the step is one product
    else:
        max_tokens = _DECODE_TOKENS if len(slots) <= 16 * _DECODE_TOKENS else _PROMPT_TOKENS
    order, tiles = cut_tiles(slots, max_tokens)
    return LoraTiles(
        order=upload(order, torch.int64, device),
        tiles=upload(tiles, torch.int32, device),
        max_tokens=max_tokens,
    )


def attach(module: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let a module that computes linears answer `add(its result, its input)`."""
    original: Callable[[Tensor], Tensor] = module.forward

    def forward(x: Tensor) -> Tensor:
        return add(original(x), x)

    module.__dict__["forward"] = forward


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    del module.__dict__["forward"]


def is_attached(module: nn.Module) -> bool:
    """Whether something was attached to this module."""
    return "forward" in module.__dict__
