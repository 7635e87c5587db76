"""Attention over paged keys and values in plain torch: the CPU path, and what the other kernels are held to.

What depends on lengths and page ids alone (which pages to gather, which positions a query sees) is a `Plan`, made
once per step and shared by all layers. Sequences with one query each (decodes) are answered together, one gather
and one product per bucket of similar lengths, or by a native kernel where there is one; a sequence with more
queries is answered alone, and so it is by a native kernel. Beginnings that decodes may have in common are answered
for apart, once for all who have them, as in Hydragen (arXiv 2402.05099).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Shorter beginnings are not worth a product of their own: of 512 positions, one sequence alone pays half as much
# again for it, three as much as without, and 32 half.
_MIN_PREFIX = 256
# So many queries times positions are answered sooner one by one than gathered and multiplied by torch.
_MAX_ONE_BY_ONE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sequences answered together: n sequences of one query, or one sequence (n = 1) of t queries.

    rows   [n * t] int64                  their rows in q and out
    pages  [n * m] int64                  m pages per sequence to gather; short ones repeat their last page
    stale  [s] int64                      gathered positions that hold no key of the sequence
    mask   [n, 1, t, m * page_size] float 0 where the query sees the position, else −inf
    """

    rows: Tensor
    pages: Tensor
    stale: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """Queries that a native kernel answers each by itself, straight from their sequences' pages.

    rows       [n] int32   their rows in q and out
    sequences  [n] int32   whose they are
    ends       [n] int32   positions that each sees
    starts     [n] int32   positions of each that prefixes answer for; None: none of any
    """

    rows: Tensor
    sequences: Tensor
    ends: Tensor
    starts: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePrefix:
    """A beginning that several sequences of one query have in common, which a native kernel answers for.

    rows   [n] int32   their rows in q and out
    pages  [m] int32   of the beginning
    length             its positions
    """

    rows: Tensor
    pages: Tensor
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeChunk:
    """A sequence of several queries that a native kernel answers.

    Attributes:
        sequence: which it is.
        start, stop: its rows in q and out.
        context: its length.
    """

    sequence: int
    start: int
    stop: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to answer one step for one sliding window."""

    groups: tuple[Group, ...]
    decodes: Decodes | None = None
    chunks: tuple[NativeChunk, ...] = ()
    prefixes: tuple[NativePrefix, ...] = ()


def plan_paged_attention(
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    page_size: int,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    has_native: bool = False,
    has_native_chunks: bool = False,
    prefix_lens: Sequence[int] = (),
    in_prompt: Sequence[bool] = (),
) -> Plan:
    """Plan one step; arguments as in `paged_attention`, `dtype` is that of q.

    Args:
        has_native: decodes are answered by a native kernel, and short sequences of several queries one by one.
        has_native_chunks: sequences of several queries have a native kernel of their own.
        prefix_lens: positions at the beginning of each sequence that others may have in the same pages; empty:
            nobody has. Whether others do or not, a long one is answered for apart, so that nobody's answer depends
            on who else is in the step.
        in_prompt: whether each sequence's queries are of its prompt; empty: of none. A native kernel that answers
            several queries then answers a single one too: how a prompt is cut into pieces depends on others, and
            its rows must not.
    """
    starts, contexts = query_start.tolist(), context_lens.tolist()
    buckets: dict[tuple[int, int], list[int]] = {}
    decodes: list[tuple[int, int, int]] = []
    chunks: list[NativeChunk] = []
    for i, context_len in enumerate(contexts):
        num_queries = starts[i + 1] - starts[i]
        if has_native_chunks and (num_queries > 1 or (num_queries == 1 and in_prompt and in_prompt[i])):
            chunks.append(NativeChunk(sequence=i, start=starts[i], stop=starts[i + 1], context=context_len))
        elif has_native and (num_queries == 1 or num_queries * context_len <= _MAX_ONE_BY_ONE):
            decodes += [(starts[i] + j, i, context_len - num_queries + j + 1) for j in range(num_queries)]
        elif num_queries > 1:
            buckets[(num_queries, -1 - i)] = [i]
        elif num_queries == 1:
            num_pages = _last_page(context_len, page_size) - _first_page(context_len, 1, page_size, sliding_window)
            buckets.setdefault((1, num_pages.bit_length()), []).append(i)
    groups = []
    for (num_queries, _), members in buckets.items():
        index = torch.tensor(members)
        groups.append(
            _plan_group(
                page_table[index].long(),
                query_start[index].long(),
                [contexts[i] for i in members],
                num_queries,
                page_size,
                dtype,
                sliding_window,
            )
        )
    if not decodes:
        return Plan(groups=tuple(groups), chunks=tuple(chunks))
    rows, sequences, ends = torch.tensor(decodes, dtype=torch.int32).T.contiguous()
    shared = [0] * len(decodes)
    if has_native_chunks and sliding_window is None and prefix_lens:
        # A piece of a prompt may be one query too, and end before its soft prompt does.
        whole_pages = [min(prefix_lens[i], end - 1) // page_size * page_size for _, i, end in decodes]
        shared = [length if length >= _MIN_PREFIX else 0 for length in whole_pages]
    return Plan(
        groups=tuple(groups),
        decodes=Decodes(
            rows=rows,
            sequences=sequences,
            ends=ends,
            starts=torch.tensor(shared, dtype=torch.int32) if any(shared) else None,
        ),
        chunks=tuple(chunks),
        prefixes=_find_prefixes(page_table, page_size, decodes, shared),
    )


def _find_prefixes(
    page_table: Tensor, page_size: int, decodes: Sequence[tuple[int, int, int]], lengths: Sequence[int]
) -> tuple[NativePrefix, ...]:
    """One for all sequences whose beginnings lie in the same pages."""
    found: dict[tuple[int, ...], list[int]] = {}
    for (row, sequence, _), length in zip(decodes, lengths, strict=True):
        if length:
            found.setdefault(tuple(page_table[sequence, : length // page_size].tolist()), []).append(row)
    return tuple(
        NativePrefix(
            rows=torch.tensor(members, dtype=torch.int32),
            pages=torch.tensor(pages, dtype=torch.int32),
            length=len(pages) * page_size,
        )
        for pages, members in found.items()
    )


def _plan_group(
    page_table: Tensor,
    starts: Tensor,
    contexts: list[int],
    num_queries: int,
    page_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> Group:
    context_lens = torch.tensor(contexts)[:, None]
    first = torch.tensor([_first_page(c, num_queries, page_size, window) for c in contexts])[:, None]
    last = torch.tensor([_last_page(c, page_size) for c in contexts])[:, None]
    columns = first + torch.arange(int((last - first).max()) + 1)
    pages = page_table.gather(1, columns.minimum(last)).flatten()

    positions = (columns[:, :, None] * page_size + torch.arange(page_size)).flatten(1)[:, None, None, :]
    queries = (context_lens - num_queries + torch.arange(num_queries))[:, None, :, None]
    hidden = positions > queries
    if window is not None:
        hidden |= positions <= queries - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    stale = (positions >= context_lens[:, :, None, None]).flatten().nonzero().flatten()
    rows = (starts[:, None] + torch.arange(num_queries)).flatten()
    return Group(rows=rows, pages=pages, stale=stale, mask=mask)


def _first_page(context_len: int, num_queries: int, page_size: int, window: int | None) -> int:
    """Column of the page table with the first position that any of the queries sees."""
    return 0 if window is None else max(0, context_len - num_queries - window + 1) // page_size


def _last_page(context_len: int, page_size: int) -> int:
    return (context_len - 1) // page_size


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Answer the groups of a planned step; arguments as in `softprompt_kernels.paged_attention`.

    Returns [T, H, D], contiguous; the rows of the plan's decodes and chunks are left for the native kernels.
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    for group in plan.groups:
        out[group.rows] = _attend(q[group.rows], keys, values, group, scale, softcap, sinks)
    return out


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    num_sequences, _, num_queries, _ = group.mask.shape
    _, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[2]
    k = _gather(keys, group).transpose(1, 2)  # [n, Hkv, S, D]
    v = _gather(values, group).transpose(1, 2)
    # A key head is never repeated: the query heads that share it become further queries (n sequences of one query)
    # or stand beside each other with a broadcast key (one sequence).
    if num_queries == 1:
        folded = q.view(num_sequences, num_kv_heads, -1, head_dim)
        sinks = None if sinks is None else sinks.view(1, num_kv_heads, -1, 1)
        return _softmax_product(folded, k, v, group.mask, scale, softcap, sinks).reshape(
            num_sequences, num_heads, head_dim
        )
    beside = q.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
    k = k.transpose(0, 1).expand(-1, beside.shape[1], -1, -1)
    v = v.transpose(0, 1).expand(-1, beside.shape[1], -1, -1)
    sinks = None if sinks is None else sinks.view(num_kv_heads, -1, 1, 1)
    answer = _softmax_product(beside, k, v, group.mask, scale, softcap, sinks)
    return answer.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def _gather(pages: Tensor, group: Group) -> Tensor:
    """[n, S, Hkv, D], where S = m * page_size. Positions that hold no key are zeroed: they may be NaN, and a
    masked NaN is still a NaN."""
    gathered = pages.index_select(0, group.pages).flatten(0, 1).index_fill_(0, group.stale, 0)
    return gathered.view(group.mask.shape[0], -1, *pages.shape[2:])


def _softmax_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)
