"""Triton kernel of `lora_shrink`: one program per (tile, slice, part of the inputs).

A batch of decodes has few tiles, and a program that walks through thousands of inputs alone takes longer than the
linear itself. So the inputs are cut into parts, whose sums `lora_expand` adds up: in one order, unlike atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.processors import num_processors, plan_parts

_PROGRAMS_PER_PROCESSOR = 4
_MAX_PARTS = 16


# The number of tokens changes from step to step, for which nothing shall compile anew.
@triton.jit(do_not_specialize=["part_stride"])
def _lora_shrink_kernel(
    h_ptr,  # [P, n, S, R] float32, contiguous
    x_ptr,  # [T, in]
    a_ptr,  # [filled, S, R, in], contiguous
    scales_ptr,  # [slots, S]
    ranks_ptr,  # [slots, S] int32
    order_ptr,  # [n] int64
    tiles_ptr,  # [m, 3] int32
    size,  # in
    x_stride,
    part_stride,  # n * S * R
    num_slices,
    R,
    NUM_PARTS: tl.constexpr,  # P
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # ≥ a tile's tokens
    BLOCK_R: tl.constexpr,  # ≥ R
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    piece = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if count == 0:
        return
    t = tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    is_token = t < count
    # All that the tile leads to at once: each load that waits for another costs as much as a block of inputs.
    rank = tl.load(ranks_ptr + slot * num_slices + piece)
    scale = tl.load(scales_ptr + slot * num_slices + piece)
    token = tl.load(order_ptr + first + t, mask=is_token, other=0)
    if rank == 0:
        return
    x_rows = x_ptr + token[:, None] * x_stride + k[None, :]
    a_rows = a_ptr + ((slot * num_slices + piece) * R + r[None, :]) * size + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    part_size = tl.cdiv(tl.cdiv(size, BLOCK_K), NUM_PARTS) * BLOCK_K
    begin = part * part_size
    for start in range(begin, tl.minimum(begin + part_size, size), BLOCK_K):
        is_input = start + k < size
        x = tl.load(x_rows + start, mask=is_token[:, None] & is_input[None, :], other=0.0)
        a = tl.load(a_rows + start, mask=is_input[:, None] & (r < rank)[None, :], other=0.0)
        acc += tl.dot(x.to(a.dtype), a, input_precision=PRECISION)
    rows = part.to(tl.int64) * part_stride + ((first + t) * num_slices + piece) * R
    tl.store(h_ptr + rows[:, None] + r[None, :], acc * scale, mask=is_token[:, None] & (r < rank)[None, :])


def lora_shrink(
    x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles, *, num_parts: int | None = None
) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.lora_shrink`.

    Args:
        num_parts: into which inputs are cut, a power of two; None: as many as fill the device.
    """
    _, num_slices, max_rank, size = a.shape
    num_tiles = len(tiles.tiles)
    # tl.dot wants 16 and more along every axis.
    block_t = max(16, triton.next_power_of_2(tiles.max_tokens))
    block_r = max(16, triton.next_power_of_2(max_rank))
    block_k = _plan_block(a.dtype, max(block_t, block_r))
    if num_parts is None:
        num_parts = plan_parts(
            num_tiles * num_slices,
            wanted=_PROGRAMS_PER_PROCESSOR * num_processors(x.device),
            most=min(triton.cdiv(size, block_k), _MAX_PARTS),
        )
    h = torch.empty((num_parts, len(tiles.order), num_slices, max_rank), dtype=torch.float32, device=x.device)
    if num_tiles == 0:
        return h
    _lora_shrink_kernel[(num_tiles, num_slices, num_parts)](
        h,
        x,
        a,
        scales,
        ranks,
        tiles.order,
        tiles.tiles,
        size,
        x.stride(0),
        h.stride(0),
        num_slices,
        max_rank,
        NUM_PARTS=num_parts,
        PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
    )
    return h


def _plan_block(dtype: torch.dtype, block_rows: int) -> int:
    """Inputs that one program reads at once, of as many tokens or rows of a: as many as its memory holds well."""
    # Without tensor cores, more take more registers than there are.
    return 64 if dtype == torch.float32 else max(64, min(256, 2**13 // block_rows))
