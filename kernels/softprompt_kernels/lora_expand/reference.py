"""`lora_expand` in plain torch: the path of CPUs without native kernels, and what the others are held to."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles, pick_rows


def lora_expand(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    """Arguments as in `softprompt_kernels.lora_expand`."""
    h = h.sum(0).to(b.dtype)
    rank_of, columns = ranks.tolist(), list(pairwise(starts.tolist()))
    for slot, first, count in tiles.tiles.tolist():
        if not any(rank_of[slot]):
            continue
        rows = pick_rows(out, tiles.order, first, count)
        for s, (rank, (start, stop)) in enumerate(zip(rank_of[slot], columns, strict=True)):
            if rank:
                rows[:, start:stop] += F.linear(h[first : first + count, s, :rank], b[slot, start:stop, :rank])
        if count > 1:
            out[tiles.order[first : first + count]] = rows
