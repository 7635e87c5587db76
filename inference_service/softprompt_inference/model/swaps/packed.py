"""Linear layers whose weights are laid out once, for CPUs: by our kernels where they can, else by oneDNN.

Our kernels multiply bfloat16 on processors that do so themselves, and float32 with weights that are bfloat16's.

An ordinary linear has its weights reordered, or read in an order that suits the product badly, in every call.
"""

import torch
from softprompt_kernels import native
from softprompt_kernels.native.lora import PackedLoras
from torch import Tensor, nn

from softprompt_inference.model.lora.context import LoraContext

_ops = torch.ops.mkldnn


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has packed products for such weights, in its build of torch or in our kernels."""
    return _has_onednn(weight) or is_native(weight)


def _has_onednn(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not all(hasattr(_ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(_ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float16 and bool(_ops._is_mkldnn_fp16_supported())


def is_native(weight: Tensor) -> bool:
    """Whether our kernels multiply with these weights; of float32 it looks at every one."""
    return native.supports_linear(weight) or native.supports_wide(weight)


def pack(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear with these weights [out, in] and bias [out]; only for what `can_pack`."""
    return NativeLinear(weight, bias) if is_native(weight) else PackedLinear(weight, bias)


def trace_of(weight: Tensor) -> Tensor:
    """What is left of a weight, [0], for models that look at the dtype or device of it."""
    return weight.detach().new_empty(0)


class NativeLinear(nn.Module):
    """`nn.Linear` over weights that our kernels have packed. Each row's result is the same in any batch.

    Attributes:
        loras: that may change it, in the steps of `lora`.
    """

    lora: LoraContext | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.loras = PackedLoras(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.weight = trace_of(weight)
        self.packed = native.pack_linear(weight.detach())
        self.bias = None if bias is None else native.pack_bias(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        step = None if self.lora is None else self.lora.step
        return native.linear(x, self.packed, self.bias, columns=self.out_features, loras=self.loras, step=step)


class NativeGate(nn.Module):
    """act(gate(x)) * up(x) in one pass over both weights.

    Args:
        gate, up: linears of one shape, of which both or none have a bias.
        activation: one of `native.ACTIVATIONS`.

    Attributes:
        loras: that may change gate and up, in the steps of `lora`.
    """

    lora: LoraContext | None = None

    def __init__(self, gate: nn.Linear, up: nn.Linear, activation: str) -> None:
        super().__init__()
        self.loras = PackedLoras(gate.weight.dtype)
        self.out_features = gate.out_features
        self.activation = activation
        self.packed = native.pack_gated(gate.weight.detach(), up.weight.detach())
        self.bias = None if gate.bias is None else native.pack_gated_bias(gate.bias.detach(), up.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        return native.linear(
            x,
            self.packed,
            self.bias,
            columns=self.out_features,
            activation=self.activation,
            gated=True,
            loras=self.loras,
            step=None if self.lora is None else self.lora.step,
        )


class PackedLinear(nn.Module):
    """`nn.Linear` over weights that oneDNN has packed, with an activation in the same pass.

    Args:
        weight: [out, in]; not kept.
        bias: [out], or None.
        activation: oneDNN's name of it: "none", "swish" (SiLU) or "gelu".
        algorithm: of "gelu": "none" (exact) or "tanh".
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, activation: str = "none", algorithm: str = ""
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = trace_of(weight)
        self._packed = _ops._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().clone()
        self._activation = activation
        self._algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        y: Tensor = _ops._linear_pointwise(x, self._packed, self._bias, self._activation, [], self._algorithm)
        return y

    def forward_plain(self, x: Tensor) -> Tensor:
        """`forward` without the activation."""
        y: Tensor = _ops._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y

    def forward_times(self, x: Tensor, factor: Tensor) -> Tensor:
        """`forward(x) * factor` in one pass: x [..., in], factor [..., out] → [..., out]; without activation."""
        y: Tensor = _ops._linear_pointwise.binary(x, factor, self._packed, self._bias, "mul")
        return y
