"""The attention function that transformers' models call, and the paged keys and values behind it.

A model is loaded with `attn_implementation=ATTENTION`. Its attention modules then call one registered function,
which hands the call to whatever hangs on the module: a `CallRecorder` while the loader learns the model's layers,
a `PagedLayer` when it serves. Step state lives in one `StepContext` that all layers of a model share, not in
keyword arguments, which some models drop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from softprompt_kernels import native
from softprompt_kernels.kv_write import kv_write
from softprompt_kernels.paged_attention import Plan, paged_attention, plan_paged_attention
from softprompt_kernels.rope import rope
from softprompt_kernels.rope_kv_write import rope_kv_write
from torch import Tensor, nn
from transformers import AttentionInterface

from softprompt_inference.model.kv_pages import KVPages
from softprompt_inference.model.transfer import upload

ATTENTION = "softprompt"
_HANDLER = "softprompt_attention"
_ROTARY = "softprompt_rotary"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention module, after its projections.

    q       [T, H, D]
    k, v    [T, Hkv, D]
    sinks   [H], or None
    rotary  cos and sin, both [T, D], by which q and k are still to be turned as `rope` does; None: they are turned
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    unsupported: str
    rotary: tuple[Tensor, Tensor] | None = None


class Handler(Protocol):
    """What may hang on an attention module."""

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Answer the call: [T, H, D]."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - zero outside training
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: q [1, H, T, D], k and v [1, Hkv, T, D] → ([1, T, H, D], None)."""
    unsupported = ""
    if attention_mask is not None:
        unsupported = "makes its own attention mask"
    elif is_causal is False or getattr(module, "is_causal", True) is False:
        unsupported = "attends to later tokens"
    elif others.get("position_bias") is not None:
        unsupported = "adds a position bias to its attention scores"
    call = AttentionCall(
        q=query[0].transpose(0, 1),
        k=key[0].transpose(0, 1),
        v=value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        unsupported=unsupported,
        rotary=_left_rotary(query, key),
    )
    return attend(module, call)[None], None


def leave_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Let the attention call that is given these very tensors turn them; cos and sin are [T, D].

    A model that computes something else from them first is not noticed: whoever lets it do so checks its answers.
    """
    rotary = (cos, sin)
    for tensor in (query, key):
        setattr(tensor, _ROTARY, rotary)


def _left_rotary(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    rotary: tuple[Tensor, Tensor] | None = getattr(query, _ROTARY, None)
    if rotary is not getattr(key, _ROTARY, None):
        raise RuntimeError(
            "of queries and keys, one is to be turned by its rotary embedding, and the other is not"
        )
    return rotary


def attend(module: nn.Module, call: AttentionCall) -> Tensor:
    """Let whatever hangs on the module answer its call: [T, H, D]."""
    handler: Handler = getattr(module, _HANDLER)
    return handler.attend(module, call)


AttentionInterface.register(ATTENTION, attention_forward)


def attach(module: nn.Module, handler: Handler) -> None:
    """Let `handler` answer the module's attention calls."""
    setattr(module, _HANDLER, handler)


def detach(module: nn.Module) -> None:
    """Undo `attach`; nothing happens where nothing hangs."""
    if hasattr(module, _HANDLER):
        delattr(module, _HANDLER)


class CallRecorder:
    """Notes who calls for attention and how, and answers as if the tokens were one whole sequence."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, AttentionCall]] = []

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Plain causal attention; only its shape matters."""
        self.calls.append((module, call))
        if call.unsupported or call.k.shape != call.v.shape:
            return call.q.new_zeros(*call.q.shape[:2], call.v.shape[2])
        q, k = (call.q, call.k) if call.rotary is None else rope(call.q, call.k, *call.rotary)
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, call.v))
        repeats = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale).transpose(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One attention layer as it was seen at work.

    Attributes:
        module: the module that calls for attention.
        num_heads, num_kv_heads, head_dim: shape of its queries, and of its keys and values.
        sliding_window: positions a query sees, itself among them; None: all.
    """

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """The geometry of one step, common to all layers.

    positions     [T] int64               of each token in its sequence
    slots         [T] int64               where each token's key and value go: page * page_size + offset
    page_table    [B, max_pages] int32
    query_start   [B + 1] int32
    context_lens  [B] int32               with the step's tokens
    prefix_lens   B                       positions of the soft prompt that each sequence begins with
    in_prompt     B                       whether each one's tokens are of its prompt
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    page_size: int
    prefix_lens: Sequence[int] = ()
    in_prompt: Sequence[bool] = ()
    plans: dict[tuple[int | None, bool, bool], Plan] = field(default_factory=dict)

    def plan(self, window: int | None, keys: Tensor, *, is_plain: bool) -> Plan | None:
        """The CPU path's plan for layers with this window, made for the first of them; None on a GPU.

        Args:
            is_plain: neither softcap nor sinks.
        """
        if self.slots.device.type != "cpu":
            return None
        key = (window, native.supports(keys), is_plain and native.supports_chunks(keys))
        if key not in self.plans:
            self.plans[key] = plan_paged_attention(
                self.page_table,
                self.query_start,
                self.context_lens,
                page_size=self.page_size,
                dtype=keys.dtype,
                sliding_window=window,
                has_native=key[1],
                has_native_chunks=key[2],
                prefix_lens=self.prefix_lens,
                in_prompt=self.in_prompt,
            )
        return self.plans[key]


def build_step_batch(
    spans: Sequence[tuple[int, int, Sequence[int]]],
    *,
    page_size: int,
    device: torch.device,
    prefix_lens: Sequence[int] = (),
    in_prompt: Sequence[bool] = (),
) -> StepBatch:
    """Lay out one step.

    Args:
        spans: (first position, number of new tokens, pages) of each sequence.
        prefix_lens: positions of the soft prompt that each begins with; empty: none of any.
        in_prompt: whether each one's tokens are of its prompt; empty: of none.
    """
    # Lists, not arrays: of the few tokens of most steps, one operation of numpy takes as long as the whole loop.
    positions: list[int] = []
    slots: list[int] = []
    query_start, context_lens = [0], []
    for start, count, page_ids in spans:
        stop = start + count
        positions += range(start, stop)
        slots += page_slots(page_ids, start, stop, page_size=page_size)
        query_start.append(query_start[-1] + count)
        context_lens.append(stop)
    table = np.zeros((len(spans), -(-max(context_lens) // page_size)), dtype=np.int32)
    for row, (_, _, page_ids), context_len in zip(table, spans, context_lens, strict=True):
        num_pages = -(-context_len // page_size)
        row[:num_pages] = page_ids[:num_pages]
    return StepBatch(
        positions=upload(positions, torch.int64, device),
        slots=upload(slots, torch.int64, device),
        page_table=upload(table, torch.int32, device),
        query_start=upload(query_start, torch.int32, device),
        context_lens=upload(context_lens, torch.int32, device),
        page_size=page_size,
        prefix_lens=prefix_lens,
        in_prompt=in_prompt,
    )


def page_slots(page_ids: Sequence[int], start: int, stop: int, *, page_size: int) -> list[int]:
    """Where the positions start … stop − 1 of a sequence lie: page * page_size + offset."""
    return [page_ids[p // page_size] * page_size + p % page_size for p in range(start, stop)]


class StepContext:
    """Holds the step that is being computed."""

    def __init__(self) -> None:
        self.batch: StepBatch | None = None


class PagedLayer:
    """The keys and values of one attention layer, and its attention over them.

    keys, values  [num_pages, page_size, Hkv, D]
    """

    def __init__(self, context: StepContext, keys: Tensor, values: Tensor) -> None:
        self.context = context
        self.keys = keys
        self.values = values

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:  # noqa: ARG002
        """Write the new keys and values into their pages, then attend to all pages of each sequence."""
        batch = self.context.batch
        assert batch is not None, "the model ran outside a step"
        dtype = self.keys.dtype
        q, k, v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
        if call.rotary is None:
            kv_write(self.keys, self.values, k, v, batch.slots)
        else:
            q = rope_kv_write(q, k, v, *call.rotary, self.keys, self.values, batch.slots)
        return paged_attention(
            q,
            self.keys,
            self.values,
            batch.page_table,
            batch.query_start,
            batch.context_lens,
            scale=call.scale,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
            sinks=call.sinks,
            plan=batch.plan(call.sliding_window, self.keys, is_plain=call.softcap is None and call.sinks is None),
        ).to(call.q.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedStep:
    """A step that native kernels can attend to in several layers at once.

    Attributes:
        pages: keys and values of each layer.
        plan: holds for every layer, as they have one window.
    """

    batch: StepBatch
    pages: list[tuple[Tensor, Tensor]]
    plan: Plan


def paged_step(modules: Sequence[nn.Module], window: int | None) -> PagedStep | None:
    """The step that these attention modules are in; None where torch must compute some of their attention.

    Args:
        window: of all of them, which have neither softcap nor sinks.
    """
    layers = [getattr(module, _HANDLER, None) for module in modules]
    if not isinstance(first := layers[0], PagedLayer) or first.context.batch is None:
        return None
    batch = first.context.batch
    plan = batch.plan(window, first.keys, is_plain=True)
    if plan is None or plan.groups:
        return None
    pages = [(layer.keys, layer.values) for layer in layers if isinstance(layer, PagedLayer)]
    assert len(pages) == len(layers), "some layers have pages, and some have not"
    return PagedStep(batch=batch, pages=pages, plan=plan)


def attach_pages(
    layers: Sequence[LayerSpec],
    context: StepContext,
    *,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVPages:
    """Give every layer fresh pages, in place of those it had; returns the memory behind them."""
    for layer in layers:
        detach(layer.module)
    pages = KVPages(
        [(layer.num_kv_heads, layer.head_dim) for layer in layers],
        num_pages=num_pages,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    for index, layer in enumerate(layers):
        keys, values = pages.layer(index)
        attach(layer.module, PagedLayer(context, keys, values))
    return pages


def page_bytes(layers: Sequence[LayerSpec], *, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return sum(2 * page_size * layer.num_kv_heads * layer.head_dim * dtype.itemsize for layer in layers)
