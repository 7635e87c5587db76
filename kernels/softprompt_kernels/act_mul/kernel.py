"""Triton kernel of `act_mul`: one program per (row, block of columns)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _act_mul_kernel(
    gate_ptr,  # [T, n]
    up_ptr,  # [T, n]
    out_ptr,  # [T, n], contiguous
    n,
    gate_stride,
    up_stride,
    GELU_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU_TANH:
        # 0.5 * (1 + tanh(y)) = sigmoid(2y)
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        activated = gate * tl.sigmoid(2.0 * inner)
    else:
        activated = gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * n + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.act_mul`."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    n = gate.shape[-1]
    gate_rows, up_rows = gate.view(-1, n), up.view(-1, n)
    block = min(1024, triton.next_power_of_2(n))
    _act_mul_kernel[(gate_rows.shape[0], triton.cdiv(n, block))](
        gate_rows,
        up_rows,
        out,
        n,
        gate_rows.stride(0),
        up_rows.stride(0),
        GELU_TANH=activation == "gelu_tanh",
        BLOCK=block,
    )
    return out
