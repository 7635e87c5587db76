"""The tokens of one step by LoRA: what `lora_shrink` and `lora_expand` walk through instead of a batch.

Semantics:
    order = the tokens with a slot, those of one slot side by side
    tiles = (slot, first, count): order[first : first + count] use this slot

Between the two operations a token's values stand at its place in `order`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

__all__ = ["LoraTiles", "cut_tiles", "pick_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTiles:
    """One step's tokens with a LoRA, for all its linears.

    order       [n] int64      rows of the batch; unique
    tiles       [m, 3] int32   slot, first place in `order`, number of places (0: nothing to do)
    max_tokens                 no tile has more
    """

    order: Tensor
    tiles: Tensor
    max_tokens: int


def cut_tiles(slots: Sequence[int], max_tokens: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """`order` and `tiles` of a step.

    Args:
        slots: of each token of the batch; −1: none.
        max_tokens: of one tile.
    """
    order = sorted((token for token, slot in enumerate(slots) if slot >= 0), key=slots.__getitem__)
    tiles, first = [], 0
    for slot, tokens in groupby(order, key=slots.__getitem__):
        stop = first + len(list(tokens))
        tiles += [(slot, start, min(max_tokens, stop - start)) for start in range(first, stop, max_tokens)]
        first = stop
    return order, tiles


def pick_rows(x: Tensor, order: Tensor, first: int, count: int) -> Tensor:
    """Rows of the tokens of one tile, [count, …]; that of a single one is a view."""
    if count == 1:
        token = int(order[first])
        return x[token : token + 1]
    return x[order[first : first + count]]
