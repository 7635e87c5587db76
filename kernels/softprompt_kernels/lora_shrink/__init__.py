"""The first half of LoRA for a batch whose tokens use different ones: from a linear's input to a few values.

Semantics:
    for slot, first, count in tiles:
        for s in range(num_slices):
            r = ranks[slot, s]
            x_t = x[order[first : first + count]]
            h[:, first : first + count, s, :r].sum(0) = x_t @ a[slot, s, :r].T * scales[slot, s]

A slice is one of several linears that read the same input and whose products are made as one (q, k and v).

x       [T, in]            bf16/fp16/fp32, last stride 1
a       [filled, S, R, in] same dtype or fp32, contiguous; values behind a slot's rank are not read. Slots from
                           `filled` on have nothing
scales  [slots, S]         fp32, contiguous
ranks   [slots, S] int32   contiguous; 0: the slot has nothing for this slice
tiles                      see `lora_tiles`
h       [P, n, S, R] fp32  contiguous: the values in parts, each of some of the inputs, as many as are fast; values
                           behind a rank are not written
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.lora_shrink.reference import lora_shrink as _reference
from softprompt_kernels.lora_tiles import LoraTiles

__all__ = ["lora_shrink"]


def lora_shrink(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles) -> Tensor:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(x, a, scales, ranks)
    if x.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.lora_shrink.kernel import lora_shrink as _kernel

        return _kernel(x, a, scales, ranks, tiles)
    if native.supports_lora(x, a):
        return native.lora_shrink(x, a, scales, ranks, tiles)[None]
    return _reference(x, a, scales, ranks, tiles)


def _check(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor) -> None:
    if x.dim() != 2 or a.dim() != 4 or x.shape[1] != a.shape[3] or ranks.shape[1:] != a.shape[1:2]:
        raise ValueError(
            f"x {list(x.shape)}, a {list(a.shape)}, scales {list(scales.shape)}, ranks {list(ranks.shape)} "
            "do not fit together"
        )
    if scales.shape != ranks.shape or len(a) > len(ranks):
        raise ValueError(f"scales {list(scales.shape)}, ranks {list(ranks.shape)} and {len(a)} slots do not fit")
    if a.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"x is {x.dtype}, a is {a.dtype}; it must be the same or float32")
    if scales.dtype != torch.float32 or ranks.dtype != torch.int32:
        raise ValueError(f"scales are {scales.dtype}, ranks {ranks.dtype}; they must be float32 and int32")
    if x.stride(1) != 1 or not (a.is_contiguous() and scales.is_contiguous() and ranks.is_contiguous()):
        raise ValueError("x must be dense in its last axis, and a, scales and ranks contiguous")
