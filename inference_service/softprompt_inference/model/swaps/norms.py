"""RMS norms in one pass instead of six operations, and the residual sum of a decoder layer with its norm.

What a module computes is decided by its answer to random input, not by its name alone: Llama multiplies by the
weight, Gemma by one more than the weight.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from softprompt_kernels import native
from softprompt_kernels.rmsnorm import add_rms_norm, rms_norm
from torch import Generator, Tensor, nn

from softprompt_inference.model.attention import CallRecorder, attach, detach
from softprompt_inference.model.swaps.forward import random_like, swap_forward
from softprompt_inference.model.swaps.verify import Swap, relative_error

_NUM_TOKENS = 3
_SEED = 1
# Above the rounding of 16 bits; how exact a replacement is, its verification says.
_ALIKE = 0.02
# A layer that takes anything else computes something else.
_LAYER_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "position_embeddings",
    "kwargs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMS norm as it was seen at work."""

    module: nn.Module
    weight: Tensor
    eps: float
    unit_offset: bool


@torch.inference_mode()
def find(model: nn.Module, *, everywhere: bool = False) -> list[Swap]:
    """All RMS norms, and the decoder layers of Llama's shape that they stand in.

    Args:
        everywhere: layers also on a CPU without native kernels, where a sum costs the same with its norm and
            without.
    """
    norms = {name: norm for name, module in model.named_modules() if (norm := recognise(module)) is not None}
    swaps = [_swap_norm(name, norm) for name, norm in norms.items()]
    for name, layer in model.named_modules():
        norm = norms.get(f"{name}.post_attention_layernorm")
        if norm is None or not (everywhere or norm.weight.device.type == "cuda" or native.is_loaded()):
            continue
        if _is_llama_shaped(layer, norm):
            swaps.append(_swap_layer(name, layer, norm))
    return swaps


def recognise(module: nn.Module) -> Norm | None:
    """The RMS norm that this module is, by what it answers; None: it is something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named_so = type(module).__name__.endswith("RMSNorm")
    if not named_so or not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    x = random_like(weight, _NUM_TOKENS, weight.shape[0], generator=Generator().manual_seed(_SEED))
    answer = module(x[None])[0]
    errors = {
        unit_offset: relative_error(rms_norm(x, weight, eps=eps, unit_offset=unit_offset), answer)
        for unit_offset in (False, True)
    }
    # Of the two, the nearer: of large weights, w and 1 + w are not far apart.
    unit_offset = errors[True] < errors[False]
    if not errors[unit_offset] < _ALIKE:
        return None
    return Norm(module=module, weight=weight, eps=eps, unit_offset=unit_offset)


def _swap_norm(name: str, norm: Norm) -> Swap:
    module, weight = norm.module, norm.weight
    original: Callable[[Tensor], Tensor] = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        # Where the model computes this norm in another precision than its weight's, that is its own affair.
        if hidden_states.dtype != weight.dtype or hidden_states.stride(-1) != 1:
            return original(hidden_states)
        return rms_norm(hidden_states, weight, eps=norm.eps, unit_offset=norm.unit_offset)

    def run(generator: Generator) -> Tensor:
        answer: Tensor = module(random_like(weight, 1, _NUM_TOKENS, weight.shape[0], generator=generator))
        return answer

    return swap_forward(module, forward, name=f"rmsnorm {name}", run=run)


def _is_llama_shaped(layer: nn.Module, norm: Norm) -> bool:
    """Whether the layer is norm, attention, sum, norm, MLP, sum; only what it computes can tell."""
    parts = ("input_layernorm", "self_attn", "mlp")
    if not all(isinstance(getattr(layer, part, None), nn.Module) for part in parts):
        return False
    if not set(inspect.signature(layer.forward).parameters) <= _LAYER_ARGUMENTS:
        return False
    try:
        expected, actual = (
            run_layer(layer, forward, norm, Generator().manual_seed(_SEED))
            for forward in (layer.forward, partial(_layer_forward, layer, norm))
        )
        return relative_error(actual, expected) < _ALIKE
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # A layer that wants other arguments, or whose parts answer more than one tensor.
        return False


def _layer_forward(layer: Any, norm: Norm, hidden_states: Tensor, **others: Any) -> Tensor:
    residual, added = layer_terms(layer, norm, hidden_states, **others)
    return residual + added


def layer_terms(layer: Any, norm: Norm, hidden_states: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    """The residual and the MLP's answer, whose sum is what a layer of Llama's shape answers.

    Args:
        norm: the one between its attention and its MLP.
    """
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **others)
    normed, residual = add_rms_norm(
        attended, hidden_states, norm.weight, eps=norm.eps, unit_offset=norm.unit_offset
    )
    return residual, layer.mlp(normed)


def fused_norm(layer: Any) -> Norm | None:
    """The norm with which the residual sum before it was found to go; None: the layer is not of Llama's shape."""
    forward = getattr(layer, "__dict__", {}).get("forward")
    if not isinstance(forward, partial) or forward.func is not _layer_forward:
        return None
    norm: Norm = forward.args[1]
    return norm


def run_layer(
    layer: Any,
    forward: Callable[..., Tensor],
    norm: Norm,
    generator: Generator,
    recorder: CallRecorder | None = None,
) -> Tensor:
    """A layer's answer without a past, on random hidden states and rotary tables.

    Args:
        forward: of the layer, or in its place.
        recorder: notes the call for attention.
    """
    head_dim = layer.self_attn.head_dim
    hidden_states = random_like(norm.weight, 1, _NUM_TOKENS, norm.weight.shape[0], generator=generator)
    cos, sin = (random_like(norm.weight, 1, _NUM_TOKENS, head_dim, generator=generator) for _ in range(2))
    attach(layer.self_attn, recorder or CallRecorder())
    try:
        return forward(hidden_states, position_embeddings=(cos, sin), attention_mask=None)
    finally:
        detach(layer.self_attn)


def _swap_layer(name: str, layer: nn.Module, norm: Norm) -> Swap:
    return swap_forward(
        layer,
        partial(_layer_forward, layer, norm),
        name=f"residual and rmsnorm {name}",
        run=lambda generator: run_layer(layer, layer.forward, norm, generator),
    )
