"""Causal attention of new tokens over the pages of their sequences.

Semantics:
    for i in range(B):
        t = query_start[i + 1] - query_start[i]                # the newest t positions of the sequence
        k, v = (pages[page_table[i]].flatten(0, 1)[:context_lens[i]] for pages in (keys, values))
        positions = context_lens[i] - t + arange(t)
        seen = arange(len(k)) <= positions[:, None]
        if sliding_window: seen &= arange(len(k)) > positions[:, None] - sliding_window
        scores = scale * q[query_start[i]:query_start[i + 1]] @ k.T        # per head; G heads share a key head
        if softcap: scores = softcap * tanh(scores / softcap)
        out[...] = softmax(where(seen, scores, -inf), with sinks[h] as one more score without a value) @ v

q             [T, H, D]                   bf16/fp16/fp32, last stride 1; H = G * Hkv
keys, values  [P, page_size, Hkv, D]      same dtype, last stride 1; may hold anything past a context
page_table    [B, max_pages] int32        pages of each sequence in order; unused columns are valid page ids
query_start   [B + 1] int32               rows of q per sequence, from 0 to T
context_lens  [B] int32                   length with the new tokens
sinks         [H]                         attention sinks, or None
out           [T, H, D]                   softmax and sums in float32
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.native import attention
from softprompt_kernels.paged_attention.reference import Plan, plan_paged_attention
from softprompt_kernels.paged_attention.reference import paged_attention as _reference

__all__ = ["Plan", "paged_attention", "plan_paged_attention"]


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
    plan: Plan | None = None,
) -> Tensor:
    """See the module's docstring.

    Args:
        plan: `plan_paged_attention` of these lengths and this window, where the caller has it; used on a CPU only.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(q, keys, values, page_table, query_start, context_lens, sinks)
    if q.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.paged_attention.kernel import paged_attention as _kernel

        return _kernel(
            q,
            keys,
            values,
            page_table,
            query_start,
            context_lens,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
    if plan is None:
        plan = plan_paged_attention(
            page_table,
            query_start,
            context_lens,
            page_size=keys.shape[1],
            dtype=q.dtype,
            sliding_window=sliding_window,
            has_native=native.supports(keys),
            has_native_chunks=native.supports_chunks(keys) and softcap is None and sinks is None,
        )
    out = _reference(q, keys, values, plan, scale=scale, softcap=softcap, sinks=sinks)
    prefix = attention.prefix_room(len(q) if plan.prefixes else 0, q.shape[1], q.shape[2])
    for each in plan.prefixes:
        attention.paged_prefix(prefix, q, keys, values, each.pages, each.rows, each.length, scale=scale)
    if plan.decodes is not None:
        attention.paged_decode(
            out,
            q,
            keys,
            values,
            page_table,
            plan.decodes.rows,
            plan.decodes.sequences,
            plan.decodes.ends,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            starts=plan.decodes.starts,
            prefix=prefix,
        )
    for chunk in plan.chunks:
        attention.paged_chunk(
            out[chunk.start : chunk.stop],
            q[chunk.start : chunk.stop],
            keys,
            values,
            page_table[chunk.sequence],
            chunk.context,
            scale=scale,
            sliding_window=sliding_window,
        )
    return out


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    sinks: Tensor | None,
) -> None:
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or q.shape[2] != keys.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do not fit together"
        )
    if q.shape[1] % keys.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {keys.shape[2]} key heads evenly")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q is {q.dtype}, keys {keys.dtype}, values {values.dtype}; they must be the same")
    if q.stride(2) != 1 or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("q, keys and values must be dense in their last axis")
    for name, tensor in (("page_table", page_table), ("query_start", query_start), ("context_lens", context_lens)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}; it must be int32")
    if not page_table.shape[0] == context_lens.shape[0] == query_start.shape[0] - 1:
        raise ValueError("page_table, context_lens and query_start disagree on the number of sequences")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks {list(sinks.shape)} must hold one score per query head, {q.shape[1]}")
