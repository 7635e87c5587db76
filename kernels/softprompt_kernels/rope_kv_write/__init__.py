"""Rotate queries and keys by their positions, and write keys and values into their pages, in place.

Semantics:
    out, k = rope(q, k, cos, sin)
    kv_write(keys, values, k, v, slots)

q             [T, H, D]               bf16/fp16/fp32, last stride 1; D is even
k, v          [T, Hkv, D]             same dtype, last stride 1
cos, sin      [T, D]                  any float dtype, the same; last stride 1
keys, values  [P, page_size, Hkv, D]  same dtype as q, contiguous, written
slots         [T] int64               page * page_size + offset; unique
out           [T, H, D]               contiguous
"""

from torch import Tensor

from softprompt_kernels.kv_write import check as check_write
from softprompt_kernels.rope import check as check_rope
from softprompt_kernels.rope_kv_write.reference import rope_kv_write as _reference

__all__ = ["rope_kv_write"]


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    check_rope(q, k, cos, sin)
    check_write(keys, values, k, v, slots)
    if q.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.rope_kv_write.kernel import rope_kv_write as _kernel

        return _kernel(q, k, v, cos, sin, keys, values, slots)
    return _reference(q, k, v, cos, sin, keys, values, slots)
