"""Decoder layers of Llama's shape on CPUs: all but the attention in two calls, once the parts have been replaced.

Between small products, most of a layer's time goes from one Python call to the next. LoRA is computed within the
products; where a part cannot do that, steps with a LoRA go the parts' way. Where layers follow each other,
`stacks` computes all of them in one call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from softprompt_kernels import native
from softprompt_kernels.native.layer import DecoderLayer, LinearWeights, NormWeights
from torch import Generator, Tensor, nn

from softprompt_inference.model.attention import AttentionCall, CallRecorder, attend
from softprompt_inference.model.lora.context import LoraContext, is_attached
from softprompt_inference.model.swaps import norms, rotary
from softprompt_inference.model.swaps.forward import swap_forward
from softprompt_inference.model.swaps.gated import GatedMLP
from softprompt_inference.model.swaps.linears import product_of
from softprompt_inference.model.swaps.packed import NativeGate, NativeLinear
from softprompt_inference.model.swaps.verify import Swap

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_SEED = 1


@torch.inference_mode()
def find(model: nn.Module, lora: LoraContext) -> list[Swap]:
    """The layers whose every part is one of ours already."""
    swaps = []
    for name, layer in model.named_modules():
        found = _recognise(layer)
        if found is not None:
            swaps.append(_swap(name, layer, *found, lora=lora))
    return swaps


def _recognise(layer: Any) -> tuple[DecoderLayer, AttentionCall, norms.Norm] | None:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, GatedMLP) or norms.fused_norm(layer) is None:
        return None
    if {name for name, _ in attention.named_children()} != {*_PROJECTIONS, "o_proj"}:
        return None
    qkv = product_of([getattr(attention, name) for name in _PROJECTIONS])
    parts = (qkv, attention.o_proj, mlp.down)
    if not all(isinstance(part, NativeLinear) for part in parts) or not isinstance(mlp.product, NativeGate):
        return None
    before, between = (norms.recognise(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    if before is None or between is None or rotary.function_of(attention) is None:
        return None
    recorder = CallRecorder()
    norms.run_layer(layer, layer.forward, between, Generator().manual_seed(_SEED), recorder)
    [(_, call)] = recorder.calls
    if call.q.shape[2] > native.MAX_HEAD_DIM:
        return None
    fused = DecoderLayer(
        norms=(_norm(before), _norm(between)),
        qkv=_linear(qkv),
        out=_linear(attention.o_proj),
        gated=_linear(mlp.product),
        down=_linear(mlp.down),
        activation=mlp.product.activation,
        dtype=call.q.dtype,
        num_heads=call.q.shape[1],
        num_kv_heads=call.k.shape[1],
        head_dim=call.q.shape[2],
        scale=call.scale,
        sliding_window=call.sliding_window,
    )
    return fused, call, between


def _norm(norm: norms.Norm) -> NormWeights:
    return NormWeights(weight=norm.weight, eps=norm.eps, unit_offset=norm.unit_offset)


def _linear(part: Any) -> LinearWeights:
    return LinearWeights(packed=part.packed, bias=part.bias, columns=part.out_features, loras=part.loras)


class FusedForward:
    """A layer's forward where the step allows it; otherwise the original's.

    Attributes:
        attention: the layer's module that calls for attention.
        call: how it does so.
        lora: of the steps to come.
        norm_weight: [hidden], of the norm between attention and MLP.
    """

    def __init__(
        self,
        layer: Any,
        decoder: DecoderLayer,
        call: AttentionCall,
        original: Callable[..., Tensor],
        lora: LoraContext,
    ) -> None:
        self.attention: nn.Module = layer.self_attn
        self.decoder = decoder
        self.call = call
        self.norm_weight: Tensor = layer.post_attention_layernorm.weight
        self._original = original
        self.lora = lora
        self._products: Sequence[Any] = (
            product_of([getattr(layer.self_attn, name) for name in _PROJECTIONS]),
            layer.self_attn.o_proj,
            layer.mlp.down,
        )
        # `replace` would look at all fields anew in every layer of every step.
        self._like = partial(
            AttentionCall,
            scale=call.scale,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
            sinks=call.sinks,
            unsupported=call.unsupported,
        )

    @property
    def takes_loras(self) -> bool:
        """Whether the LoRAs of the step, if there are any, can be computed within the products."""
        if self.lora.step is None:
            return True
        return not any(map(is_attached, self._products))

    def fits(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> bool:
        """Whether a call with these arguments is one for the fused layer."""
        return (
            self.takes_loras
            and attention_mask is None
            and hidden_states.shape[0] == 1
            and hidden_states.is_contiguous()
            and position_embeddings is not None
            and position_embeddings[0].shape[2] == self.call.q.shape[2]
        )

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """hidden_states [1, T, hidden], cos and sin [1, T, D]"""
        if position_embeddings is None or not self.fits(hidden_states, attention_mask, position_embeddings):
            return self._original(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **others
            )
        hidden, (cos, sin), step = hidden_states[0], position_embeddings, self.lora.step
        q, k, v = self.decoder.before(hidden, cos[0], sin[0], step)
        attended = attend(self.attention, self._like(q=q, k=k, v=v))
        return self.decoder.after(attended.contiguous(), hidden, step)[None]


def fused_forward(layer: nn.Module) -> FusedForward | None:
    """The fused forward that a layer has, if it has one."""
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, FusedForward) else None


def _swap(
    name: str, layer: Any, decoder: DecoderLayer, call: AttentionCall, norm: norms.Norm, *, lora: LoraContext
) -> Swap:
    return swap_forward(
        layer,
        FusedForward(layer, decoder, call, layer.forward, lora),
        name=f"decoder layer {name}",
        run=lambda generator: norms.run_layer(layer, layer.forward, norm, generator),
    )
