"""Write the keys and values of new tokens into their pages, in place.

Semantics:
    keys.flatten(0, 1)[slots] = k
    values.flatten(0, 1)[slots] = v

keys, values  [P, page_size, Hkv, D]  contiguous, written
k, v          [T, Hkv, D]             same dtype, last stride 1
slots         [T] int64               page * page_size + offset; unique
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.kv_write.reference import kv_write as _reference
from softprompt_kernels.native import attention

__all__ = ["check", "kv_write"]


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    check(keys, values, k, v, slots)
    if keys.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.kv_write.kernel import kv_write as _kernel

        _kernel(keys, values, k, v, slots)
    elif native.is_loaded():
        attention.kv_write(keys, values, k, v, slots)
    else:
        _reference(keys, values, k, v, slots)


def check(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and strides are as listed."""
    if k.shape != (slots.shape[0], *keys.shape[2:]) or v.shape != k.shape or values.shape != keys.shape:
        raise ValueError(
            f"keys {list(keys.shape)}, values {list(values.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
            f"slots {list(slots.shape)} do not fit together"
        )
    if not keys.dtype == values.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"keys are {keys.dtype} and {values.dtype}, k {k.dtype}, v {v.dtype}; they must be the same"
        )
    if not (keys.is_contiguous() and values.is_contiguous() and k.stride(2) == 1 and v.stride(2) == 1):
        raise ValueError("pages must be contiguous, and k and v dense in their last axis")
    if slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype}; they must be int64")
