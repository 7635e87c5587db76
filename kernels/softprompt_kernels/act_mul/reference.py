"""`act_mul` in plain torch: the CPU path, and what the Triton kernel is held to."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Arguments as in `softprompt_kernels.act_mul`."""
    # In place: a product of its own costs as much again as the activation.
    return ACTIVATIONS[activation](gate.contiguous()).mul_(up)
