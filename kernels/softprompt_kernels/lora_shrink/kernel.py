"""Triton kernel of `lora_shrink`: one program per (tile, slice), of which empty tiles end at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles


@triton.jit
def _kernel(
    h_ptr,  # [n, S, R], contiguous
    x_ptr,  # [T, in]
    a_ptr,  # [filled, S, R, in], contiguous
    scales_ptr,  # [slots, S]
    ranks_ptr,  # [slots, S] int32
    order_ptr,  # [n] int64
    tiles_ptr,  # [m, 3] int32
    size,  # in
    x_stride,
    num_slices,
    R,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # ≥ a tile's tokens
    BLOCK_R: tl.constexpr,  # ≥ R
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    rank = tl.load(ranks_ptr + slot * num_slices + part)
    if rank == 0:
        return
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    is_token = t < count
    token = tl.load(order_ptr + first + t, mask=is_token, other=0)
    x_rows = x_ptr + token[:, None] * x_stride + k[None, :]
    a_rows = a_ptr + ((slot * num_slices + part) * R + r[None, :]) * size + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        is_input = start + k < size
        x = tl.load(x_rows + start, mask=is_token[:, None] & is_input[None, :], other=0.0)
        a = tl.load(a_rows + start, mask=is_input[:, None] & (r < rank)[None, :], other=0.0)
        acc += tl.dot(x.to(a.dtype), a, input_precision=PRECISION)
    scale = tl.load(scales_ptr + slot * num_slices + part)
    out = h_ptr + ((first + t[:, None]) * num_slices + part) * R + r[None, :]
    tl.store(out, (acc * scale).to(h_ptr.dtype.element_ty), mask=is_token[:, None] & (r < rank)[None, :])


def lora_shrink(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.lora_shrink`."""
    _, num_slices, max_rank, size = a.shape
    h = torch.empty((len(tiles.order), num_slices, max_rank), dtype=a.dtype, device=x.device)
    if len(tiles.tiles) == 0:
        return h
    _kernel[(len(tiles.tiles), num_slices)](
        h,
        x,
        a,
        scales,
        ranks,
        tiles.order,
        tiles.tiles,
        size,
        x.stride(0),
        num_slices,
        max_rank,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        # tl.dot wants 16 and more along every axis.
        BLOCK_T=max(16, triton.next_power_of_2(tiles.max_tokens)),
        BLOCK_R=max(16, triton.next_power_of_2(max_rank)),
        BLOCK_K=64,
    )
    return h
