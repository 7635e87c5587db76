"""`rope_kv_write` in plain torch: the CPU path, and what the Triton kernel is held to."""

from torch import Tensor

from softprompt_kernels.kv_write.reference import kv_write
from softprompt_kernels.rope.reference import rope


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Arguments as in `softprompt_kernels.rope_kv_write`."""
    out, turned = rope(q, k, cos, sin)
    kv_write(keys, values, turned, v, slots)
    return out
