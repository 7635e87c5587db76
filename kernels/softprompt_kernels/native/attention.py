"""Attention over paged keys and values, and the write to the pages, in C.

Arguments are checked by the operations that call, `softprompt_kernels.paged_attention` and `kv_write`.
"""

import torch
from torch import Tensor

from softprompt_kernels import native

# Of a register; behind each head's sums stand its top score and its total.
_LANES = 16


def paged_decode(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    rows: Tensor,
    sequences: Tensor,
    ends: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    starts: Tensor | None = None,
    prefix: Tensor | None = None,
) -> None:
    """Attention of queries, each by itself; arguments as in `softprompt_kernels.paged_attention` and

    out        [T, H, D]   contiguous, like q; written at `rows`
    rows       [n] int32   rows of q and out
    sequences  [n] int32   their sequences
    ends       [n] int32   how many positions of these each sees
    starts     [n] int32   positions of each that `paged_prefix` has answered for; None: none of any
    prefix                 what it wrote
    """
    scores = None if sinks is None else sinks.float().contiguous()
    failed = native.loaded().softprompt_paged_decode(
        out.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_table.data_ptr(),
        ends.data_ptr(),
        rows.data_ptr(),
        sequences.data_ptr(),
        None if scores is None else scores.data_ptr(),
        None if starts is None else starts.data_ptr(),
        None if prefix is None else prefix.data_ptr(),
        len(rows),
        page_table.shape[1],
        *_layout(q, keys),
        native.DTYPES[q.dtype],
        sliding_window or 0,
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for its scores")


def prefix_room(rows: int, num_heads: int, dim: int) -> Tensor:
    """Where `paged_prefix` writes, for so many rows of queries: sums, top scores and totals, in float32."""
    return torch.empty(rows, num_heads, dim + _LANES)


def paged_prefix(
    prefix: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rows: Tensor,
    length: int,
    *,
    scale: float,
) -> None:
    """The part of `paged_decode` that sequences with the same beginning have in common, computed together.

    prefix    by `prefix_room`, for as many rows as q; written at `rows`
    pages     [m] int32    of the beginning
    rows      [n] int32    of the sequences' queries
    length                 positions of the beginning
    """
    library = native.loaded()
    answer = library.softprompt_wide_prefix if q.dtype == torch.float32 else library.softprompt_paged_prefix
    failed = answer(
        prefix.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        pages.data_ptr(),
        rows.data_ptr(),
        len(rows),
        length,
        *_layout(q, keys),
        scale,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for a beginning")


def paged_chunk(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    context: int,
    *,
    scale: float,
    sliding_window: int | None,
) -> None:
    """Attention of the newest tokens of one sequence; arguments as in `softprompt_kernels.paged_attention` and

    out      [t, H, D]   contiguous; written
    q        [t, H, D]   of the newest t tokens
    pages    [m] int32   of the sequence
    context              its length with those tokens
    """
    library = native.loaded()
    answer = library.softprompt_wide_chunk if q.dtype == torch.float32 else library.softprompt_paged_chunk
    failed = answer(
        out.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        pages.data_ptr(),
        len(q),
        context,
        *_layout(q, keys),
        sliding_window or 0,
        scale,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for a context")


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Arguments as in `softprompt_kernels.kv_write`."""
    native.loaded().softprompt_kv_write(
        keys.data_ptr(),
        values.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        slots.data_ptr(),
        len(slots),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.shape[2],
        keys.shape[3],
        keys.element_size(),
    )


def _layout(q: Tensor, keys: Tensor) -> tuple[int, ...]:
    """What the C functions are told of queries and pages: strides, heads, dimension, page size."""
    return (q.stride(0), q.stride(1), q.shape[1], keys.shape[2], keys.shape[3], keys.shape[1])
