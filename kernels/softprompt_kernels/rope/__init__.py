"""Rotate queries and keys by their positions, in the half-split layout of Llama and GPT-NeoX.

Semantics:
    for x in (q, k):
        first, second = x.chunk(2, -1)
        out = x * cos[:, None] + cat([-second, first], -1) * sin[:, None]

q         [T, H, D]    bf16/fp16/fp32, last stride 1; D is even
k         [T, Hkv, D]  same dtype, last stride 1
cos, sin  [T, D]       any float dtype, the same; last stride 1: the tables' rows of the tokens' positions
out       two tensors like q and k, contiguous
"""

from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.rope.reference import rope as _reference

__all__ = ["check", "rope"]


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    check(q, k, cos, sin)
    if q.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.rope.kernel import rope as _kernel

        return _kernel(q, k, cos, sin)
    if native.supports_rows(q) and native.supports_rows(cos) and q.shape[2] <= native.MAX_HEAD_DIM:
        return native.rope(q, k, cos, sin)
    return _reference(q, k, cos, sin)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and strides are as listed."""
    num_tokens, head_dim = q.shape[0], q.shape[-1]
    if (
        not q.dim() == k.dim() == 3
        or (k.shape[0], k.shape[2]) != (num_tokens, head_dim)
        or not cos.shape == sin.shape == (num_tokens, head_dim)
        or head_dim % 2
    ):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)} "
            "do not fit together"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}; they must be the same")
    if cos.dtype != sin.dtype:
        raise ValueError(f"cos is {cos.dtype}, sin is {sin.dtype}; they must be the same")
    if not q.stride(2) == k.stride(2) == cos.stride(1) == sin.stride(1) == 1:
        raise ValueError("q, k, cos and sin must be dense in their last axis")
