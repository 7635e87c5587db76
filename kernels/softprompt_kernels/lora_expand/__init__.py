"""The second half of LoRA for a batch whose tokens use different ones: add to a linear's result, in place.

Semantics:
    for slot, first, count in tiles:
        for s in range(num_slices):
            r, columns = ranks[slot, s], slice(starts[s], starts[s + 1])
            h_t = h[:, first : first + count, s, :r].sum(0)  # rounded to the dtype of b
            out[order[first : first + count], columns] += h_t @ b[slot, columns, :r].T

out     [T, out]           bf16/fp16/fp32, last stride 1, written; other tokens are left alone
h       [P, n, S, R] fp32  contiguous; of `lora_shrink`
b       [filled, out, R]   like out, or fp32; contiguous; values behind a slot's rank do not matter. Slots from
                           `filled` on have nothing
ranks   [slots, S] int32   contiguous; 0: the slot has nothing for this slice
starts  [S + 1] int32      columns of each slice, one beside the other, from 0 to out
unit                       divides every start; of a multiple of 16 a GPU reads and writes whole vectors
tiles                      see `lora_tiles`
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.lora_expand.reference import lora_expand as _reference
from softprompt_kernels.lora_tiles import LoraTiles

__all__ = ["lora_expand"]


def lora_expand(
    out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles, unit: int = 1
) -> None:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(out, h, b, ranks, starts, tiles)
    if out.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.lora_expand.kernel import lora_expand as _kernel

        _kernel(out, h, b, ranks, starts, tiles, unit)
    elif native.supports_lora(out, b):
        native.lora_expand(out, h.sum(0), b, ranks, starts, tiles)
    else:
        _reference(out, h, b, ranks, starts, tiles)


def _check(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    num_slices = len(starts) - 1
    fits = out.dim() == 2 and b.dim() == 3 and out.shape[1] == b.shape[1] and ranks.shape[1:] == (num_slices,)
    if not fits or len(b) > len(ranks) or h.shape[1:] != (len(tiles.order), num_slices, b.shape[2]):
        raise ValueError(
            f"out {list(out.shape)}, h {list(h.shape)}, b {list(b.shape)}, ranks {list(ranks.shape)}, "
            f"starts {list(starts.shape)}, order {list(tiles.order.shape)} do not fit together"
        )
    if h.dtype != torch.float32 or b.dtype not in (out.dtype, torch.float32):
        raise ValueError(f"out is {out.dtype}, h {h.dtype}, b {b.dtype}; h must be float32, and b it or as out is")
    if ranks.dtype != torch.int32 or starts.dtype != torch.int32:
        raise ValueError(f"ranks are {ranks.dtype}, starts {starts.dtype}; they must be int32")
    if out.stride(1) != 1 or not (h.is_contiguous() and b.is_contiguous() and ranks.is_contiguous()):
        raise ValueError("out must be dense in its last axis, and h, b and ranks contiguous")
