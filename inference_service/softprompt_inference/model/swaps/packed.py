"""Linear layers whose weights oneDNN has laid out once, for CPUs.

An ordinary linear has its weights reordered, or read in an order that suits the product badly, in every call.
"""

import torch
from torch import Tensor, nn

_ops = torch.ops.mkldnn


def can_pack(weight: Tensor) -> bool:
    """Whether this machine and this build of torch have packed products for such weights."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not all(hasattr(_ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    if weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(_ops._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float16 and bool(_ops._is_mkldnn_fp16_supported())


class PackedLinear(nn.Module):
    """`nn.Linear` over packed weights, with an activation in the same pass.

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
        self._packed = _ops._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().clone()
        self._activation = activation
        self._algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]"""
        y: Tensor = _ops._linear_pointwise(x, self._packed, self._bias, self._activation, [], self._algorithm)
        return y

    def forward_times(self, x: Tensor, factor: Tensor) -> Tensor:
        """`forward(x) * factor` in one pass: x [..., in], factor [..., out] → [..., out]; without activation."""
        y: Tensor = _ops._linear_pointwise.binary(x, factor, self._packed, self._bias, "mul")
        return y
