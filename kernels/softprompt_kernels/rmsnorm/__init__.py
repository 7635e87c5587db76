"""Root-mean-square norm over the last axis, with an optional sum before it.

Semantics:
    h = x + residual                                            # add_rms_norm only; rounded to the dtype of x
    normed = h / sqrt(mean(h ** 2, -1) + eps)
    out = normed * (1 + weight if unit_offset else weight)

x         [..., n]  bf16/fp16/fp32, last stride 1; of the leading axes all but the last must merge into one
residual  [..., n]  shape and dtype of x, likewise
weight    [n]       same dtype, contiguous
out       [..., n]  contiguous; computed in float32 and rounded once
h         [..., n]  contiguous
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.rmsnorm.reference import add_rms_norm as _add_reference
from softprompt_kernels.rmsnorm.reference import rms_norm as _reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    """`out`; see the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(x, weight)
    if x.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.rmsnorm.kernel import rms_norm as _kernel

        return _kernel(x, weight, eps=eps, unit_offset=unit_offset)
    if native.supports_rows(x):
        return native.rms_norm(x, None, weight, eps=eps, unit_offset=unit_offset)[0]
    return _reference(x, weight, eps=eps, unit_offset=unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """`out` and `h`; see the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(-1) != 1:
        raise ValueError(
            f"residual {list(residual.shape)} {residual.dtype} must have the shape and dtype of x {list(x.shape)} "
            f"{x.dtype} and be dense in its last axis"
        )
    if x.device.type == "cuda":
        from softprompt_kernels.rmsnorm.kernel import add_rms_norm as _kernel

        return _kernel(x, residual, weight, eps=eps, unit_offset=unit_offset)
    if native.supports_rows(x):
        return native.rms_norm(x, residual, weight, eps=eps, unit_offset=unit_offset)
    return _add_reference(x, residual, weight, eps=eps, unit_offset=unit_offset)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 2 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not fit together")
    if x.dtype != weight.dtype or not x.dtype.is_floating_point or x.dtype == torch.float64:
        raise ValueError(f"x is {x.dtype}, weight is {weight.dtype}; they must be the same, of 16 or 32 bits")
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError("x must be dense in its last axis, and weight contiguous")
