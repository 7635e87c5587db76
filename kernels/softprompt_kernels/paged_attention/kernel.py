"""Triton kernel of `paged_attention`: online softmax over key tiles, one program per (block of queries, key head).

The query heads that share a key head lie beside the queries in the rows of one tile, so that decodes (one query)
and prefills (many) fill the same tensor-core product. The grid depends on tensor shapes only, never on lengths, so
a launch can be captured in a CUDA graph. The block-to-sequence search is that of vLLM's unified attention kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


# A batch of one sequence must not compile the search away into a loop over constants.
@triton.jit(do_not_specialize=["num_sequences"])
def _kernel(
    q_ptr,  # [T, H, D]
    keys_ptr,  # [P, page_size, Hkv, D]
    values_ptr,  # [P, page_size, Hkv, D]
    page_table_ptr,  # [B, max_pages] int32
    query_start_ptr,  # [B + 1] int32
    context_lens_ptr,  # [B] int32
    sinks_ptr,  # [H], or unused
    out_ptr,  # [T, H, D]
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
    page_size,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    BLOCK_Q: tl.constexpr,  # queries per program
    BLOCK_M: tl.constexpr,  # rows per program, ≥ BLOCK_Q * GROUP
    BLOCK_N: tl.constexpr,  # positions per tile
    BLOCK_D: tl.constexpr,  # ≥ D
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
        # The sink is a score without a value: it starts the running maximum and sum.
        top = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

    block_position = context_len - num_queries + first_query  # of the block's first query
    end = tl.minimum(block_position + BLOCK_Q, context_len)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(block_position - window + 1, 0) // BLOCK_N * BLOCK_N

    for tile in range(begin, end, BLOCK_N):
        positions = tile + tl.arange(0, BLOCK_N)
        in_context = positions < end
        table_offsets = low.to(tl.int64) * page_table_stride + positions // page_size
        page = tl.load(page_table_ptr + table_offsets, mask=in_context, other=0).to(tl.int64)
        slot = (positions % page_size).to(tl.int64)
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

    out = acc / tl.where(row_mask, total, 1.0)[:, None]
    out_offsets = token[:, None] * out_stride_t + head.to(tl.int64)[:, None] * out_stride_h + dims[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=q_mask)


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
) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.paged_attention`. Returns [T, H, D]."""
    num_tokens, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = keys.shape
    num_sequences = context_lens.shape[0]
    group = num_heads // num_kv_heads
    rows_per_program = 16 if num_tokens == num_sequences else 64
    block_m = max(rows_per_program, triton.next_power_of_2(group))
    block_q = block_m // group
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    grid = (num_tokens // block_q + num_sequences, num_kv_heads)
    _kernel[grid](
        q,
        keys,
        values,
        page_table,
        query_start,
        context_lens,
        q if sinks is None else sinks,
        out,
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
        page_size,
        scale,
        0.0 if softcap is None else softcap,
        0 if sliding_window is None else sliding_window,
        D=head_dim,
        GROUP=group,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=32 if head_dim > 128 or q.dtype == torch.float32 else 64,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=sliding_window is not None,
        HAS_SINKS=sinks is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return out
