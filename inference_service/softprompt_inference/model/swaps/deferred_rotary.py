"""Rotary embedding in one pass with the write of keys and values to their pages, on a GPU.

An attention module whose rotary embedding has been replaced hands on queries and keys as they are, and its
attention call turns them.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from softprompt_inference.model.attention import CallRecorder, attach, detach, leave_rotary
from softprompt_inference.model.swaps import rotary
from softprompt_inference.model.swaps.forward import run_hooked, swap_forward
from softprompt_inference.model.swaps.verify import Swap


@torch.inference_mode()
def find(model: nn.Module, run: Callable[[], object], *, everywhere: bool = False) -> list[Swap]:
    """The attention modules whose rotary embedding can wait for the attention call.

    Args:
        run: runs the model once on a few tokens, with which each is tried.
        everywhere: also on a CPU, where nothing is gained.
    """
    if not everywhere and next(model.parameters()).device.type != "cuda":
        return []
    names = {module: name for name, module in model.named_modules() if rotary.function_of(module) is not None}
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: Any, named: Any) -> None:
        calls.append((module, args, named))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    run_hooked(run, hooks)
    return [_swap(names[module], module, args, named) for module, args, named in calls]


def _swap(name: str, module: nn.Module, args: Any, named: Any) -> Swap:
    current: Any = module.forward
    original = rotary.function_of(module)
    assert original is not None, "the rotary embedding is not ours"
    forward = rotary.with_function(current.__func__, partial(_defer, original))

    def run(_: Generator) -> Tensor:
        attach(module, CallRecorder())
        try:
            answer: Tensor = module(*args, **named)[0]
        finally:
            detach(module)
        return answer

    return swap_forward(module, types.MethodType(forward, module), name=f"rotary with attention {name}", run=run)


def _defer(
    original: rotary.Rotary, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    if others or named or not rotary.is_plain(q, k, cos, sin):
        return original(q, k, cos, sin, *others, **named)
    leave_rotary(q, k, cos[0], sin[0])
    return q, k
