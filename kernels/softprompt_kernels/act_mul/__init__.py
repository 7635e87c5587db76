"""The gate of a gated MLP: an activation of one half times the other.

Semantics:
    out = act(gate) * up
    act = {"silu": x * sigmoid(x), "gelu_tanh": 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))}

gate, up  [..., n]  bf16/fp16/fp32, last stride 1; the leading axes must merge into one. Both may be halves of the
                    output of one merged projection, or tensors of their own
out       [..., n]  contiguous; computed in float32 and rounded once (on a CPU after the activation too)
"""

from torch import Tensor

from softprompt_kernels.act_mul.reference import ACTIVATIONS
from softprompt_kernels.act_mul.reference import act_mul as _reference

__all__ = ["ACTIVATIONS", "act_mul"]


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See the module's docstring.

    Args:
        activation: one of ACTIVATIONS.

    Raises:
        ValueError: shapes, dtypes, strides or activation are not as listed.
    """
    _check(gate, up, activation)
    if gate.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.act_mul.kernel import act_mul as _kernel

        return _kernel(gate, up, activation)
    return _reference(gate, up, activation)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if gate.dim() < 2 or gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} do not fit together")
    if gate.dtype != up.dtype:
        raise ValueError(f"gate is {gate.dtype}, up is {up.dtype}; they must be the same")
    if gate.stride(-1) != 1 or up.stride(-1) != 1:
        raise ValueError("gate and up must be dense in their last axis")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
