"""Rotary embedding of queries and keys in one pass instead of fourteen operations, where there is a kernel for it.

Transformers' attention modules call a function of their source file by the name `apply_rotary_pos_emb`. A module's
forward is taken again with another function under that name; the source file's own is not touched. Which layout
the function has is decided by its answers: half-split is replaced, interleaved is left alone.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from softprompt_kernels import native
from softprompt_kernels.rope import rope
from torch import Generator, Tensor, nn

from softprompt_inference.model.swaps.forward import random_like, swap_forward
from softprompt_inference.model.swaps.verify import Swap, relative_error

_FUNCTION = "apply_rotary_pos_emb"
_NUM_TOKENS, _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 5, 4, 2, 32
_SEED = 1
# Above the rounding of 16 bits; another layout differs by about one.
_ALIKE = 0.02

Rotary = Callable[..., tuple[Tensor, Tensor]]


@torch.inference_mode()
def find(model: nn.Module, *, everywhere: bool = False) -> list[Swap]:
    """The attention modules with half-split rotary embedding.

    Args:
        everywhere: also on a CPU without native kernels, where nothing is gained.
    """
    forwards: dict[int, types.FunctionType | None] = {}
    swaps = []
    for name, module in model.named_modules():
        function = getattr(module.forward, "__func__", None)
        like = next(module.parameters(), None)
        if not isinstance(function, types.FunctionType) or not _calls_rotary(function):
            continue
        if like is None or not (everywhere or like.device.type == "cuda" or native.is_loaded()):
            continue
        if id(function) not in forwards:
            forwards[id(function)] = _with_kernel(function, like)
        replacement = forwards[id(function)]
        if replacement is not None:
            swaps.append(_swap(name, module, replacement, like))
    return swaps


def _calls_rotary(function: types.FunctionType) -> bool:
    return _FUNCTION in function.__code__.co_names and callable(function.__globals__.get(_FUNCTION))


def _with_kernel(forward: types.FunctionType, like: Tensor) -> types.FunctionType | None:
    """The same forward with our rotary embedding; None where the original's is of another kind."""
    original: Rotary = forward.__globals__[_FUNCTION]
    replacement = _make_rotary(original)
    try:
        expected, actual = (
            _run(function, like, Generator().manual_seed(_SEED)) for function in (original, replacement)
        )
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # It takes other arguments, or tables of another shape.
        return None
    if not relative_error(actual, expected) < _ALIKE:
        return None
    return with_function(forward, replacement)


def with_function(forward: types.FunctionType, function: Rotary) -> types.FunctionType:
    """The same forward with another rotary embedding."""
    copy = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, _FUNCTION: function},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def function_of(module: nn.Module) -> Rotary | None:
    """The kernel's function by which this attention module turns queries and keys; None: it uses another."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    if not isinstance(function, types.FunctionType):
        return None
    rotary: Rotary | None = function.__globals__.get(_FUNCTION)
    return rotary if getattr(rotary, "__module__", None) == __name__ else None


def is_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are q [1, H, T, D], k [1, Hkv, T, D], cos and sin [1, T, D]."""
    plain = q.dim() == 4 and q.shape[0] == 1 and q.dtype == k.dtype
    return plain and cos.shape == (1, q.shape[2], q.shape[3]) and sin.shape == cos.shape


def _make_rotary(original: Rotary) -> Rotary:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        """Plain tensors without further arguments; anything else goes the original's way."""
        if others or named or not is_plain(q, k, cos, sin):
            return original(q, k, cos, sin, *others, **named)
        q_out, k_out = rope(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]

    return apply_rotary_pos_emb


def _run(function: Rotary, like: Tensor, generator: Generator) -> Tensor:
    """Queries and keys as one row of numbers."""
    q, k = (
        random_like(like, 1, _NUM_TOKENS, heads, _HEAD_DIM, generator=generator).transpose(1, 2)
        for heads in (_NUM_HEADS, _NUM_KV_HEADS)
    )
    cos, sin = (random_like(like, 1, _NUM_TOKENS, _HEAD_DIM, generator=generator) for _ in range(2))
    return torch.cat([answer.flatten() for answer in function(q, k, cos, sin)])


def _swap(name: str, module: nn.Module, forward: types.FunctionType, like: Tensor) -> Swap:
    def run(generator: Generator) -> Tensor:
        current: Any = module.forward
        return _run(current.__func__.__globals__[_FUNCTION], like, generator)

    return swap_forward(module, types.MethodType(forward, module), name=f"rotary {name}", run=run)
