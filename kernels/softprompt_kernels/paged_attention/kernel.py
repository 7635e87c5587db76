"""Triton kernel of `paged_attention`: online softmax over key tiles, one program per (block of queries, key head).

The query heads that share a key head lie beside the queries in the rows of one tile, so that decodes (one query)
and prefills (many) fill the same tensor-core product. The grid depends on tensor shapes only, never on lengths, so
a launch can be captured in a CUDA graph. The block-to-sequence search is that of vLLM's unified attention kernel.

Few decodes would leave most of a GPU idle. Their contexts are split among programs; each answers as if its part
were all there is and leaves its sum, maximum and weighted values, which a second kernel combines (flash-decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.processors import num_processors, plan_parts

_MAX_SPLITS = 32


# A batch of one sequence must not compile the search away into a loop over constants, and no step shall compile
# anew for how many pages its longest sequence has, or how many tokens are in it.
@triton.jit(do_not_specialize=["num_sequences", "page_table_stride", "split_stride"])
def _paged_attention_kernel(
    q_ptr,  # [T, H, D]
    keys_ptr,  # [P, page_size, Hkv, D]
    values_ptr,  # [P, page_size, Hkv, D]
    page_table_ptr,  # [B, max_pages] int32
    query_start_ptr,  # [B + 1] int32
    context_lens_ptr,  # [B] int32
    sinks_ptr,  # [H], or unused
    out_ptr,  # [T, H, D]; with splits [NUM_SPLITS, T, H, D] float32, contiguous, divided by nothing
    top_ptr,  # [NUM_SPLITS, T, H] float32: largest score of each split, or unused
    total_ptr,  # [NUM_SPLITS, T, H] float32: sum of its weights, 0 where it saw nothing; or unused
    q_stride_t,
    q_stride_h,
    keys_stride_p,
    keys_stride_s,
    keys_stride_h,
    values_stride_p,
    values_stride_s,
    values_stride_h,
    page_table_stride,
    out_stride_t,
    out_stride_h,
    num_sequences,
    split_stride,  # T * H
    scale,
    softcap,
    window,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    BLOCK_Q: tl.constexpr,  # queries per program
    BLOCK_M: tl.constexpr,  # rows per program, ≥ BLOCK_Q * GROUP
    BLOCK_N: tl.constexpr,  # positions per tile
    BLOCK_D: tl.constexpr,  # ≥ D
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)

    # Sequence i owns the blocks from query_start[i] // BLOCK_Q + i on: never fewer than it needs. Find the last
    # sequence that begins at or before this block.
    low = block - block  # zero, as a tensor of the loop's type
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    start = tl.load(query_start_ptr + low)
    num_queries = tl.load(query_start_ptr + low + 1) - start
    first_query = (block - (start // BLOCK_Q + low)) * BLOCK_Q
    if first_query >= num_queries:
        return
    context_len = tl.load(context_lens_ptr + low)

    rows = tl.arange(0, BLOCK_M)
    query = first_query + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    row_mask = (rows < BLOCK_Q * GROUP) & (query < num_queries)
    position = context_len - num_queries + query  # [BLOCK_M] absolute position of the query
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    token = (start + query).to(tl.int64)
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q_offsets = token[:, None] * q_stride_t + head.to(tl.int64)[:, None] * q_stride_h + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)

    if HAS_SINKS:
        # The sink is a score without a value: it starts the running maximum and sum, of the first split only.
        is_first = tl.program_id(2) == 0
        top = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
        top = tl.where(is_first, top, float("-inf"))
        total = tl.where(is_first, 1.0, tl.zeros([BLOCK_M], dtype=tl.float32))
    else:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    block_position = context_len - num_queries + first_query  # of the block's first query
    end = tl.minimum(block_position + BLOCK_Q, context_len)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(block_position - window + 1, 0) // BLOCK_N * BLOCK_N
    stop = end
    if NUM_SPLITS > 1:
        num_tiles = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), NUM_SPLITS)
        begin += tl.program_id(2) * num_tiles * BLOCK_N
        stop = tl.minimum(begin + num_tiles * BLOCK_N, end)

    for tile in range(begin, stop, BLOCK_N):
        positions = tile + tl.arange(0, BLOCK_N)
        in_context = positions < end
        table_offsets = low.to(tl.int64) * page_table_stride + positions // PAGE_SIZE
        page = tl.load(page_table_ptr + table_offsets, mask=in_context, other=0).to(tl.int64)
        slot = (positions % PAGE_SIZE).to(tl.int64)
        kv_mask = in_context[:, None] & dim_mask[None, :]
        k_offsets = page * keys_stride_p + slot * keys_stride_s + kv_head.to(tl.int64) * keys_stride_h
        k = tl.load(keys_ptr + k_offsets[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        if HAS_SOFTCAP:
            # tanh(x) = 2 * sigmoid(2x) − 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        visible = row_mask[:, None] & (positions[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (positions[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet must not compute −inf − (−inf).
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp(top - safe_top)
        weights = tl.exp(scores - safe_top[:, None])
        total = total * rescale + tl.sum(weights, 1)
        v_offsets = page * values_stride_p + slot * values_stride_s + kv_head.to(tl.int64) * values_stride_h
        v = tl.load(values_ptr + v_offsets[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top

    if NUM_SPLITS > 1:
        part_row = tl.program_id(2).to(tl.int64) * split_stride + token * (GROUP * tl.num_programs(1)) + head
        tl.store(top_ptr + part_row, top, mask=row_mask)
        tl.store(total_ptr + part_row, total, mask=row_mask)
        # The values of a split that saw nothing are not read. Its sum is 0; NaN is not, and must be read.
        part_mask = q_mask & (total != 0.0)[:, None]
        tl.store(out_ptr + part_row[:, None] * D + dims[None, :], acc, mask=part_mask)
    else:
        out = acc / tl.where(row_mask, total, 1.0)[:, None]
        out_offsets = token[:, None] * out_stride_t + head.to(tl.int64)[:, None] * out_stride_h + dims[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["split_stride"])
def _combine_splits_kernel(
    parts_ptr,  # [NUM_SPLITS, T, H, D] float32, contiguous
    top_ptr,  # [NUM_SPLITS, T, H] float32
    total_ptr,  # [NUM_SPLITS, T, H] float32
    out_ptr,  # [T, H, D]
    split_stride,  # T * H
    num_heads,
    out_stride_t,
    out_stride_h,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # ≥ D
    NUM_SPLITS: tl.constexpr,  # a power of two
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part_rows = tl.arange(0, NUM_SPLITS).to(tl.int64) * split_stride + token * num_heads + head
    total = tl.load(total_ptr + part_rows)
    saw = total != 0.0
    top = tl.load(top_ptr + part_rows, mask=saw, other=float("-inf"))
    best = tl.max(top, 0)
    # A maximum of −inf beside a sum of NaN must not become −inf − (−inf) for the other splits too.
    best = tl.where(best == float("-inf"), 0.0, best)
    share = tl.where(saw, tl.exp(top - best), 0.0)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    part_mask = saw[:, None] & dim_mask[None, :]
    parts = tl.load(parts_ptr + part_rows[:, None] * D + dims[None, :], mask=part_mask, other=0.0)
    out = tl.sum(share[:, None] * parts, 0) / tl.sum(share * total, 0)
    out_offsets = token * out_stride_t + head.to(tl.int64) * out_stride_h + dims
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=dim_mask)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.paged_attention`. Returns [T, H, D].

    Args:
        num_splits: programs that share one context, a power of two; None: as many as fill the device.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = keys.shape
    num_sequences = context_lens.shape[0]
    group = num_heads // num_kv_heads
    is_decode = num_tokens == num_sequences
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    num_programs = num_sequences * num_kv_heads if is_decode else None
    tiles = _choose_tiles(q.dtype, head_dim, num_programs, num_processors(q.device))
    block_m = max(tiles.rows, triton.next_power_of_2(group))
    block_q = block_m // group
    block_d = max(16, triton.next_power_of_2(head_dim))
    if num_splits is None:
        max_tiles = triton.cdiv(page_table.shape[1] * page_size, tiles.positions)
        num_splits = (
            1
            if num_programs is None
            else plan_parts(num_programs, wanted=2 * num_processors(q.device), most=min(max_tiles, _MAX_SPLITS))
        )
    parts, top, total = out, out, out
    if num_splits > 1:
        parts = torch.empty((num_splits, *q.shape), dtype=torch.float32, device=q.device)
        top, total = torch.empty((2, num_splits, num_tokens, num_heads), dtype=torch.float32, device=q.device)
    grid = (num_tokens // block_q + num_sequences, num_kv_heads, num_splits)
    _paged_attention_kernel[grid](
        q,
        keys,
        values,
        page_table,
        query_start,
        context_lens,
        q if sinks is None else sinks,
        parts,
        top,
        total,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        num_sequences,
        num_tokens * num_heads,
        scale,
        0.0 if softcap is None else softcap,
        0 if sliding_window is None else sliding_window,
        PAGE_SIZE=page_size,
        D=head_dim,
        GROUP=group,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=tiles.positions,
        BLOCK_D=block_d,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=sliding_window is not None,
        HAS_SINKS=sinks is not None,
        NUM_SPLITS=num_splits,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        _combine_splits_kernel[(num_tokens, num_heads)](
            parts,
            top,
            total,
            out,
            num_tokens * num_heads,
            num_heads,
            out.stride(0),
            out.stride(1),
            D=head_dim,
            BLOCK_D=block_d,
            NUM_SPLITS=num_splits,
        )
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiles:
    """Constants of a launch.

    Attributes:
        rows: queries times heads that share a key head, of one program.
        positions: keys and values that it takes at once.
        num_stages: of them that are on their way at once.
    """

    rows: int
    positions: int
    num_warps: int = 4
    num_stages: int = 3


def _choose_tiles(dtype: torch.dtype, head_dim: int, num_programs: int | None, num_processors: int) -> _Tiles:
    """What was fastest on an H200, for heads of 64 and of 128 values.

    Args:
        num_programs: of a launch that only decodes, before contexts are split; None: there are prompts.
    """
    if dtype == torch.float32:
        # Tensor cores would round it. Without them products are unrolled: larger tiles compile for minutes and
        # take more registers than there are, as do many rows of large heads.
        return _Tiles(rows=16, positions=16)
    if head_dim > 128:
        return _Tiles(rows=16 if num_programs is not None or head_dim > 256 else 64, positions=32)
    if num_programs is None:
        return _Tiles(rows=64, positions=32, num_stages=2)
    if num_programs < num_processors:  # contexts are split: short tiles, so that there is something to split
        return _Tiles(rows=16, positions=64, num_warps=8)
    if num_programs < 4 * num_processors:
        return _Tiles(rows=16, positions=128, num_warps=8)
    return _Tiles(rows=16, positions=128 if head_dim <= 64 else 64)
