"""Triton kernel of `lora_expand`: one program per (tile, block of a slice's columns)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.processors import num_processors


# The number of tokens changes from step to step, for which nothing shall compile anew.
@triton.jit(do_not_specialize=["part_stride"])
def _lora_expand_kernel(
    out_ptr,  # [T, out]
    h_ptr,  # [P, n, S, R] float32, contiguous
    b_ptr,  # [filled, out, R], contiguous
    ranks_ptr,  # [slots, S] int32
    starts_ptr,  # [S + 1] int32
    order_ptr,  # [n] int64
    tiles_ptr,  # [m, 3] int32
    width,  # out
    out_stride,
    part_stride,  # n * S * R
    R,
    NUM_SLICES: tl.constexpr,  # S
    NUM_PARTS: tl.constexpr,  # P
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # ≥ a tile's tokens
    BLOCK_R: tl.constexpr,  # ≥ R
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    # The slice that this block of columns lies in: each has its own blocks, the last of which may not be full.
    block = tl.program_id(1)
    piece, begin, end = 0, 0, 0
    for i in tl.static_range(NUM_SLICES):
        start = tl.load(starts_ptr + i)
        stop = tl.load(starts_ptr + i + 1)
        is_here = (block >= 0) & (start + block * BLOCK_N < stop)
        piece = tl.where(is_here, i, piece)
        begin = tl.where(is_here, start + block * BLOCK_N, begin)
        end = tl.where(is_here, stop, end)
        block = tl.where(is_here, -1, block - tl.cdiv(stop - start, BLOCK_N))
    if begin >= end:
        return
    rank = tl.load(ranks_ptr + slot * NUM_SLICES + piece)
    if rank == 0:
        return
    column = begin + tl.arange(0, BLOCK_N)
    is_column = column < end
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    is_token = t < count
    h_rows = h_ptr + ((first + t[:, None]) * NUM_SLICES + piece) * R + r[None, :]
    h_mask = is_token[:, None] & (r < rank)[None, :]
    h = tl.load(h_rows, mask=h_mask, other=0.0)
    for _ in tl.static_range(NUM_PARTS - 1):
        h_rows += part_stride
        h += tl.load(h_rows, mask=h_mask, other=0.0)
    b_rows = b_ptr + (slot * width + column[None, :]) * R + r[:, None]
    b = tl.load(b_rows, mask=(r < rank)[:, None] & is_column[None, :], other=0.0)
    delta = tl.dot(h.to(b.dtype), b, input_precision=PRECISION)
    token = tl.load(order_ptr + first + t, mask=is_token, other=0)
    out = out_ptr + token[:, None] * out_stride + column[None, :]
    mask = is_token[:, None] & is_column[None, :]
    sums = tl.load(out, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)


def lora_expand(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    """Launch the kernel; arguments as in `softprompt_kernels.lora_expand`."""
    num_tiles = len(tiles.tiles)
    if num_tiles == 0:
        return
    _, width, max_rank = b.shape
    num_parts, _, num_slices, _ = h.shape
    block_n = _plan_block(num_tiles, width, num_processors(out.device))
    _lora_expand_kernel[(num_tiles, triton.cdiv(width, block_n) + num_slices - 1)](
        out,
        h,
        b,
        ranks,
        starts,
        tiles.order,
        tiles.tiles,
        width,
        out.stride(0),
        h.stride(0),
        max_rank,
        NUM_SLICES=num_slices,
        NUM_PARTS=num_parts,
        PRECISION="ieee" if b.dtype == torch.float32 else "tf32",
        # tl.dot wants 16 and more along every axis.
        BLOCK_T=max(16, triton.next_power_of_2(tiles.max_tokens)),
        BLOCK_R=max(16, triton.next_power_of_2(max_rank)),
        BLOCK_N=block_n,
    )


def _plan_block(num_tiles: int, width: int, num_processors: int) -> int:
    """Columns of one program, from shapes alone: many spare it reading h again, few give more programs."""
    for block in (256, 128):
        if num_tiles * triton.cdiv(width, block) >= 2 * num_processors:
            return block
    return 64
