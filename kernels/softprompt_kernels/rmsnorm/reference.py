"""`rmsnorm` in plain torch: the CPU path, and what the Triton kernel is held to."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    """Arguments as in `softprompt_kernels.rmsnorm`."""
    if unit_offset:
        # In 16 bits, 1 + weight would lose the small weights.
        return F.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Arguments as in `softprompt_kernels.rmsnorm`."""
    h = x + residual
    return rms_norm(h, weight, eps=eps, unit_offset=unit_offset), h
