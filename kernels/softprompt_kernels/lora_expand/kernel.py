"""Triton kernel of `lora_expand`: one program per (tile, block of a slice's columns)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.processors import num_processors

_PROGRAMS_PER_PROCESSOR = 2
_MAX_VALUES = 2**14  # of b in one program


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
    unit,  # divides every start
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
    # The slice that this block of columns lies in: each has its own blocks, the last of which may not be full.
    # The factor tells the compiler that no slice begins or ends within a vector, so that it may access whole ones.
    block = tl.program_id(1)
    piece, begin, end, stop = 0, 0, 0, 0
    for i in tl.static_range(NUM_SLICES):
        start = stop
        stop = tl.load(starts_ptr + i + 1) // unit * unit
        is_here = (block >= 0) & (start + block * BLOCK_N < stop)
        piece = tl.where(is_here, i, piece)
        begin = tl.where(is_here, start + block * BLOCK_N, begin)
        end = tl.where(is_here, stop, end)
        block = tl.where(is_here, -1, block - tl.cdiv(stop - start, BLOCK_N))
    if (count == 0) | (begin >= end):
        return
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    column = begin + tl.arange(0, BLOCK_N)
    is_token = t < count
    is_column = column < end
    # What does not depend on each other is read at once: to wait for memory takes longer than all the rest.
    rank = tl.load(ranks_ptr + slot * NUM_SLICES + piece)
    token = tl.load(order_ptr + first + t, mask=is_token, other=0)
    if rank == 0:
        return
    out_rows = out_ptr + token[:, None] * out_stride + column[None, :]
    out_mask = is_token[:, None] & is_column[None, :]
    out = tl.load(out_rows, mask=out_mask, other=0.0)
    # Whole vectors here too, of which what is behind the rank is dropped.
    is_near = (r < tl.cdiv(rank, 16) * 16) & (r < R)
    b_rows = b_ptr + (slot * width + column[None, :]) * R + r[:, None]
    b = tl.load(b_rows, mask=is_near[:, None] & is_column[None, :], other=0.0)
    b = tl.where((r < rank)[:, None], b, 0.0)
    h_rows = h_ptr + ((first + t[:, None]) * NUM_SLICES + piece) * R + r[None, :]
    h_mask = is_token[:, None] & (r < rank)[None, :]
    h = tl.load(h_rows, mask=h_mask, other=0.0)
    for _ in tl.static_range(NUM_PARTS - 1):
        h_rows += part_stride
        h += tl.load(h_rows, mask=h_mask, other=0.0)
    delta = tl.dot(h.to(b.dtype), b, input_precision=PRECISION)
    tl.store(out_rows, (out.to(tl.float32) + delta).to(out_ptr.dtype.element_ty), mask=out_mask)


def lora_expand(
    out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles, unit: int = 1
) -> None:
    """Launch the kernel; arguments as in `softprompt_kernels.lora_expand`."""
    num_tiles = len(tiles.tiles)
    if num_tiles == 0:
        return
    _, width, max_rank = b.shape
    num_parts, _, num_slices, _ = h.shape
    # tl.dot wants 16 and more along every axis.
    block_t = max(16, triton.next_power_of_2(tiles.max_tokens))
    block_r = max(16, triton.next_power_of_2(max_rank))
    block_n = _plan_block(num_tiles, width, block_r, num_processors(out.device))
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
        unit,
        NUM_SLICES=num_slices,
        NUM_PARTS=num_parts,
        PRECISION="ieee" if b.dtype == torch.float32 else "tf32",
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        BLOCK_N=block_n,
    )


def _plan_block(num_tiles: int, width: int, block_r: int, num_processors: int) -> int:
    """Columns of one program, from shapes alone: many spare it reading h again, few give more programs."""
    for block in (256, 128):
        fits_registers = block * block_r <= _MAX_VALUES
        if fits_registers and num_tiles * triton.cdiv(width, block) >= _PROGRAMS_PER_PROCESSOR * num_processors:
            return block
    return 64
