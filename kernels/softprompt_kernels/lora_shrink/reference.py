"""`lora_shrink` in plain torch: the path of CPUs without native kernels, and what the others are held to."""

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles, pick_rows


def lora_shrink(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles) -> Tensor:
    """Arguments as in `softprompt_kernels.lora_shrink`."""
    h = torch.empty((1, len(tiles.order), *a.shape[1:3]), dtype=torch.float32, device=x.device)
    rank_of, scale_of = ranks.tolist(), scales.tolist()
    for slot, first, count in tiles.tiles.tolist():
        if not any(rank_of[slot]):
            continue
        rows = pick_rows(x, tiles.order, first, count).to(a.dtype)
        for s, (rank, scale) in enumerate(zip(rank_of[slot], scale_of[slot], strict=True)):
            if rank:
                h[0, first : first + count, s, :rank] = F.linear(rows, a[slot, s, :rank]).float() * scale
    return h
