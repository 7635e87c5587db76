"""Triton kernel of `lora_expand`: one program per (tile, block of columns, slice); no two write the same value."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles


@triton.jit
def _kernel(
    out_ptr,  # [T, out]
    h_ptr,  # [n, S, R], contiguous
    b_ptr,  # [filled, out, R], contiguous
    ranks_ptr,  # [slots, S] int32
    starts_ptr,  # [S + 1] int32
    order_ptr,  # [n] int64
    tiles_ptr,  # [m, 3] int32
    width,  # out
    out_stride,
    num_slices,
    R,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # ≥ a tile's tokens
    BLOCK_R: tl.constexpr,  # ≥ R
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(2)
    slot = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    rank = tl.load(ranks_ptr + slot * num_slices + part)
    begin = tl.load(starts_ptr + part) + tl.program_id(1) * BLOCK_N
    end = tl.load(starts_ptr + part + 1)
    if rank == 0:
        return
    if begin >= end:
        return
    column = begin + tl.arange(0, BLOCK_N)
    is_column = column < end
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    is_token = t < count
    h_rows = h_ptr + ((first + t[:, None]) * num_slices + part) * R + r[None, :]
    h = tl.load(h_rows, mask=is_token[:, None] & (r < rank)[None, :], other=0.0)
    b_rows = b_ptr + (slot * width + column[None, :]) * R + r[:, None]
    b = tl.load(b_rows, mask=(r < rank)[:, None] & is_column[None, :], other=0.0)
    delta = tl.dot(h, b, input_precision=PRECISION)
    token = tl.load(order_ptr + first + t, mask=is_token, other=0)
    out = out_ptr + token[:, None] * out_stride + column[None, :]
    mask = is_token[:, None] & is_column[None, :]
    sums = tl.load(out, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)


def lora_expand(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    """Launch the kernel; arguments as in `softprompt_kernels.lora_expand`."""
    if len(tiles.tiles) == 0:
        return
    _, width, max_rank = b.shape
    num_slices = h.shape[1]
    block = min(128, triton.next_power_of_2(width))
    # As if a slice were as wide as all: how wide it is only the device knows, and blocks beyond it end at once.
    grid = (len(tiles.tiles), triton.cdiv(width, max(16, block)), num_slices)
    _kernel[grid](
        out,
        h,
        b,
        ranks,
        starts,
        tiles.order,
        tiles.tiles,
        width,
        out.stride(0),
        num_slices,
        max_rank,
        PRECISION="ieee" if b.dtype == torch.float32 else "tf32",
        # tl.dot wants 16 and more along every axis.
        BLOCK_T=max(16, triton.next_power_of_2(tiles.max_tokens)),
        BLOCK_R=max(16, triton.next_power_of_2(max_rank)),
        BLOCK_N=max(16, block),
    )
