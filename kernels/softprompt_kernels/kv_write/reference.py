"""`kv_write` in plain torch: the CPU path, and what the Triton kernel is held to."""

from torch import Tensor


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Arguments as in `softprompt_kernels.kv_write`."""
    keys.flatten(0, 1).index_copy_(0, slots, k)
    values.flatten(0, 1).index_copy_(0, slots, v)
