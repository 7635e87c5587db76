"""`lora_expand` in plain torch: the CPU path, and what the Triton kernel is held to."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles


def lora_expand(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    """Arguments as in `softprompt_kernels.lora_expand`."""
    rank_of, columns = ranks.tolist(), list(pairwise(starts.tolist()))
    for slot, first, count in tiles.tiles.tolist():
        rows = tiles.order[first : first + count]
        for s, (rank, (start, stop)) in enumerate(zip(rank_of[slot], columns, strict=True)):
            if rank:
                delta = F.linear(h[first : first + count, s, :rank], b[slot, start:stop, :rank])
                out[:, start:stop].index_add_(0, rows, delta)
