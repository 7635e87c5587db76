"""A whole model on CPUs, from its embeddings to its logits, where that is one stack of layers, a norm and a head.

Transformers' own code calls each layer, though the first of a stack answers for all, computes the tables of the
rotary embedding anew in every step, and norms all rows before it picks those that are wanted. Steps that the stack
does not take go through that code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from softprompt_inference.model.swaps.forward import run_hooked, swap_forward
from softprompt_inference.model.swaps.stacks import Stack, run_steps, stack_of
from softprompt_inference.model.swaps.verify import Swap

# Positions that tables grow by.
_BLOCK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call of a module, as it was seen."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any

    @property
    def given(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("hidden_states")


@torch.inference_mode()
def find(model: nn.Module, run: Callable[[], object], *, max_positions: int) -> list[Swap]:
    """The model itself, if one run of it shows no more than that.

    Args:
        max_positions: longest sequence for which a position's rotary embedding does not depend on others.
    """
    calls: list[_Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
        calls.append(_Call(module=module, args=args, kwargs=kwargs, answer=answer))

    run_hooked(run, [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()])
    whole = calls[-1]
    # The first layer is given the embeddings as they came, and the logits are what the head answered.
    embeddings, logits = whole.kwargs.get("inputs_embeds"), getattr(whole.answer, "logits", None)
    for first in calls:
        stack = stack_of(first.module)
        if stack is None or embeddings is None or logits is None or first.given is not embeddings:
            continue
        tables = first.kwargs.get("position_embeddings")
        rotary = _only([call for call in calls if tables is not None and call.answer is tables])
        last = _only([call for call in calls if call.module is stack.layers[-1]])
        norm = _only([call for call in calls if last is not None and call.given is last.answer])
        head = _only([call for call in calls if call.answer is logits])
        if rotary is None or norm is None or head is None or not torch.equal(head.given, norm.answer):
            continue
        forward = _Forward(
            stack=stack,
            norm=norm.module,
            head=head.module,
            tables=_Tables(rotary.module, max_positions),
            original=model.forward,
            answer=type(whole.answer),
        )
        return [_swap(model, forward)]
    return []


def _only(calls: Sequence[_Call]) -> _Call | None:
    """The one call; None where there is none, or more."""
    return calls[0] if len(calls) == 1 else None


def _swap(model: nn.Module, forward: "_Forward") -> Swap:
    def run(generator: Generator) -> Tensor:
        def compute(hidden: Tensor, positions: Tensor) -> Tensor:
            logits: Tensor = model(inputs_embeds=hidden, position_ids=positions, use_cache=False).logits
            return logits

        return run_steps(forward.stack.forwards, compute, generator)

    return swap_forward(model, forward, name="the whole model", run=run)


class _Tables:
    """Cosines and sines of the rotary embedding by position.

    None is kept from behind `max_positions`, where some embeddings become others for all positions.
    """

    def __init__(self, rotary: nn.Module, max_positions: int) -> None:
        self._rotary = rotary
        self._max_positions = max_positions
        self._cos = self._sin = torch.empty(0)

    def find(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] of positions [T], as for hidden states like these."""
        last = int(positions.max())
        if last >= self._max_positions:
            cos, sin = self._rotary(hidden_states, positions[None])
            return cos[0], sin[0]
        if last >= len(self._cos):
            every = torch.arange(min((last // _BLOCK + 1) * _BLOCK, self._max_positions))
            self._cos, self._sin = (table[0] for table in self._rotary(hidden_states, every[None]))
        return self._cos[positions], self._sin[positions]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """The model's forward where the step allows it; otherwise the original's."""

    stack: Stack
    norm: nn.Module
    head: nn.Module
    tables: _Tables
    original: Callable[..., Any]
    answer: Callable[..., Any]

    def __call__(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: Tensor | int = 0,
        **others: Any,
    ) -> Any:
        """inputs_embeds [1, T, hidden], position_ids [1, T], logits_to_keep [n], or 0: all"""
        is_plain = not (args or use_cache or others) and (
            isinstance(logits_to_keep, Tensor) or logits_to_keep == 0
        )
        if is_plain and inputs_embeds is not None and position_ids is not None and inputs_embeds.is_contiguous():
            cos, sin = self.tables.find(inputs_embeds, position_ids[0])
            found = self.stack.compute(inputs_embeds, cos, sin)
            if found is not None:
                rows = found[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else found
                return self.answer(logits=self.head(self.norm(rows)))
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            others["logits_to_keep"] = logits_to_keep
        return self.original(
            *args, inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=use_cache, **others
        )
