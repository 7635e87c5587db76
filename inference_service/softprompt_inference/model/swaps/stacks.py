"""Stacks of decoder layers on CPUs: fused layers that follow each other in one call, their attention included.

The first layer of a stack answers for all of them, and the others hand on what they are given. A step for which
that cannot be (with attention that torch computes, or with a LoRA that a part cannot take) goes through the layers
one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from softprompt_kernels.native.layer import DecoderLayers
from torch import Generator, Tensor, nn

from softprompt_inference.model.attention import (
    LayerSpec,
    StepContext,
    attach_pages,
    build_step_batch,
    detach,
    paged_step,
)
from softprompt_inference.model.swaps.forward import random_like, run_hooked, swap_forward, together
from softprompt_inference.model.swaps.layers import FusedForward, fused_forward
from softprompt_inference.model.swaps.verify import Swap

_PAGE_SIZE = 4
# (first position, tokens, pages) of each sequence in the steps that try a stack: prompts, and decodes behind them.
_STEPS = (((0, 5, (2, 0)), (0, 2, (1,))), ((5, 1, (2, 0)), (2, 1, (1,))))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call of a fused layer, as it was seen."""

    layer: nn.Module
    forward: FusedForward
    given: Tensor
    tables: tuple[Tensor, Tensor] | None
    answer: Tensor


@torch.inference_mode()
def find(model: nn.Module, run: Callable[[], object]) -> list[Swap]:
    """The stacks of a model, as they show in one run of it."""
    return [_swap(stack) for stack in _stacks(_observe(model, run))]


def _observe(model: nn.Module, run: Callable[[], object]) -> list[_Call]:
    calls: list[_Call] = []

    def note(forward: FusedForward, layer: nn.Module, args: Any, kwargs: Any, answer: Tensor) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        tables = kwargs.get("position_embeddings")
        calls.append(_Call(layer=layer, forward=forward, given=given, tables=tables, answer=answer))

    hooks = [
        layer.register_forward_hook(partial(note, forward), with_kwargs=True)
        for layer in model.modules()
        if (forward := fused_forward(layer)) is not None
    ]
    run_hooked(run, hooks)
    return calls


def _stacks(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Layers of one shape and window that take what the one before answers, and the same rotary tables."""
    stacks: list[list[_Call]] = []
    for call in calls:
        if call.forward.call.softcap is not None or call.forward.call.sinks is not None or call.tables is None:
            continue
        last = stacks[-1][-1] if stacks else None
        if (
            last is not None
            and call.given is last.answer
            and call.tables is last.tables
            and call.forward.decoder.shape == last.forward.decoder.shape
            and call.forward.decoder.dtype == last.forward.decoder.dtype
            # What a step's plan answers for once, for several sequences, depends on the window.
            and call.forward.call.sliding_window == last.forward.call.sliding_window
        ):
            stacks[-1].append(call)
        else:
            stacks.append([call])
    return stacks


class Stack:
    """Layers that one call computes.

    Attributes:
        layers: the modules.
        forwards: theirs, one by one.
    """

    def __init__(self, layers: Sequence[nn.Module], forwards: Sequence[FusedForward]) -> None:
        self.layers = layers
        self.forwards = forwards
        self._attentions = [forward.attention for forward in forwards]
        self._layers = DecoderLayers([forward.decoder for forward in forwards])
        self._answer: Tensor | None = None

    def compute(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """What the layers answer [1, T, hidden]; None for a step that goes through them one by one.

        hidden_states  [1, T, hidden]
        cos, sin       [T, D]
        """
        forward = self.forwards[0]
        if forward.lora.step is not None and not all(each.takes_loras for each in self.forwards):
            return None
        step = paged_step(self._attentions, forward.call.sliding_window)
        if step is None:
            return None
        answer = self._layers(
            hidden_states[0],
            cos,
            sin,
            step.pages,
            slots=step.batch.slots,
            page_table=step.batch.page_table,
            plan=step.plan,
            loras=forward.lora.step,
        )
        return answer[None]

    def first(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """The forward of the first layer: hidden_states [1, T, hidden], cos and sin [1, T, D]"""
        forward = self.forwards[0]
        self._answer = None
        if position_embeddings is not None and forward.fits(hidden_states, attention_mask, position_embeddings):
            cos, sin = position_embeddings
            self._answer = self.compute(hidden_states, cos[0], sin[0])
        if self._answer is not None:
            return self._answer
        return forward(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **others
        )

    def follow(self, index: int, hidden_states: Tensor, **others: Any) -> Tensor:
        """The forward of a later layer."""
        if hidden_states is not self._answer:
            return self.forwards[index](hidden_states, **others)
        if index == len(self.forwards) - 1:
            self._answer = None
        return hidden_states


def stack_of(layer: nn.Module) -> Stack | None:
    """The stack that a layer is the first of, if there is one."""
    forward = layer.__dict__.get("forward")
    owner = getattr(forward, "__self__", None)
    return owner if isinstance(owner, Stack) and forward == owner.first else None


def _swap(calls: Sequence[_Call]) -> Swap:
    layers = [call.layer for call in calls]
    stack = Stack(layers, [call.forward for call in calls])
    forwards: list[Callable[..., Tensor]] = [stack.first]
    forwards += [partial(stack.follow, index) for index in range(1, len(layers))]

    def run(generator: Generator) -> Tensor:
        def compute(hidden: Tensor, _positions: Tensor) -> Tensor:
            shape = (1, hidden.shape[1], stack.forwards[0].call.q.shape[2])
            cos, sin = (random_like(hidden, *shape, generator=generator) for _ in range(2))
            for layer in layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
            return hidden

        return run_steps(stack.forwards, compute, generator)

    parts = [
        swap_forward(layer, forward, name="", run=run) for layer, forward in zip(layers, forwards, strict=True)
    ]
    return together(parts, name=f"stack of {len(layers)} decoder layers", run=run)


def run_steps(
    forwards: Sequence[FusedForward], compute: Callable[[Tensor, Tensor], Tensor], generator: Generator
) -> Tensor:
    """What `compute` makes of hidden states [1, T, hidden] at positions [1, T], in steps over pages of its own."""
    like, context = forwards[0].norm_weight, StepContext()
    specs = [
        LayerSpec(
            module=forward.attention,
            num_heads=forward.call.q.shape[1],
            num_kv_heads=forward.call.k.shape[1],
            head_dim=forward.call.q.shape[2],
            sliding_window=forward.call.sliding_window,
        )
        for forward in forwards
    ]
    num_pages = 1 + max(page for spans in _STEPS for _, _, pages in spans for page in pages)
    attach_pages(specs, context, num_pages=num_pages, page_size=_PAGE_SIZE, dtype=like.dtype, device=like.device)
    answers = []
    try:
        for spans in _STEPS:
            context.batch = build_step_batch(spans, page_size=_PAGE_SIZE, device=like.device)
            positions = context.batch.positions[None]
            hidden = random_like(like, 1, positions.shape[1], like.shape[0], generator=generator)
            answers.append(compute(hidden, positions))
    finally:
        for spec in specs:
            detach(spec.module)
    return torch.cat(answers, dim=1)
