"""Which LoRA each token of the step that is being computed uses, and how a linear comes to notice."""

from collections.abc import Callable, Sequence

import torch
from softprompt_kernels.lora_tiles import LoraTiles, cut_tiles
from softprompt_kernels.native.lora import LoraStep
from torch import Tensor, nn

from softprompt_inference.model.transfer import upload

# Tokens of one tile on a GPU: as many as a step of decodes fills well, and as many as a prompt does.
_DECODE_TOKENS, _PROMPT_TOKENS = 16, 64


class LoraContext:
    """Holds the step's tiles; None: no token has a LoRA, and everything is computed as if there were none.

    Attributes:
        step: the tiles as our kernels for CPUs read them.
    """

    def __init__(self) -> None:
        self._tiles: LoraTiles | None = None
        self.step: LoraStep | None = None

    @property
    def tiles(self) -> LoraTiles | None:
        """Of the step that is being computed."""
        return self._tiles

    @tiles.setter
    def tiles(self, tiles: LoraTiles | None) -> None:
        self._tiles = tiles
        self.step = None if tiles is None or tiles.order.is_cuda else LoraStep(tiles)


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


class TileBuffers:
    """The tiles of steps of decodes, in memory that stays where it is.

    Args:
        max_tokens: most sequences of one step.
        max_loras: most LoRAs of one step.
    """

    def __init__(self, max_tokens: int, max_loras: int, device: torch.device) -> None:
        self._max_loras = max_loras
        num_tiles, on_cuda = self._num_tiles(max_tokens), device.type == "cuda"
        self._order = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, device=device)
        # What the buffers get next. Pinned, or the host would wait for each copy.
        self._staged_order = torch.zeros(max_tokens, dtype=torch.int64, pin_memory=on_cuda)
        self._staged_tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, pin_memory=on_cuda)

    def _num_tiles(self, num_tokens: int) -> int:
        """Most tiles of so many tokens: each LoRA may have one that is not full."""
        return min(num_tokens, self._max_loras + num_tokens // _DECODE_TOKENS)

    def fill(self, slots: Sequence[int]) -> None:
        """Bring a step into the buffers, behind what the device was told before; what was staged must have left.

        Args:
            slots: of each token; −1: none.
        """
        order, tiles = cut_tiles(slots, _DECODE_TOKENS)
        self._staged_order.numpy()[: len(order)] = order
        self._staged_tiles.zero_()
        if tiles:
            self._staged_tiles.numpy()[: len(tiles)] = tiles
        self._order.copy_(self._staged_order, non_blocking=True)
        self._tiles.copy_(self._staged_tiles, non_blocking=True)

    def view(self, num_tokens: int) -> LoraTiles:
        """The tiles of a step of up to `num_tokens` tokens; those that it does not need are empty."""
        return LoraTiles(
            order=self._order[:num_tokens],
            tiles=self._tiles[: self._num_tiles(num_tokens)],
            max_tokens=_DECODE_TOKENS,
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
