"""Triton kernel of `rmsnorm`: one program per row, which it holds in registers between the sum and the product."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rmsnorm_kernel(
    x_ptr,  # [A, B, n]
    residual_ptr,  # [A, B, n], or unused
    weight_ptr,  # [n], contiguous
    out_ptr,  # [A * B, n], contiguous
    h_ptr,  # [A * B, n], contiguous, or unused
    x_stride_a,
    x_stride_b,
    residual_stride_a,
    residual_stride_b,
    num_inner,  # B
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,  # ≥ N
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a = row // num_inner
    b = row % num_inner
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    h = tl.load(x_ptr + a * x_stride_a + b * x_stride_b + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_offsets = a * residual_stride_a + b * residual_stride_b + columns
        residual = tl.load(residual_ptr + residual_offsets, mask=mask, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * N + columns, h, mask=mask)
    h = h.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    out = h * tl.rsqrt(tl.sum(h * h, 0) / N + eps) * weight
    tl.store(out_ptr + row * N + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.rmsnorm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps, unit_offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `softprompt_kernels.rmsnorm`."""
    out, h = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, out, h, eps, unit_offset)
    return out, h


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    h: Tensor | None,
    eps: float,
    unit_offset: bool,
) -> None:
    if x.numel() == 0:
        return
    rows = _as_rows(x)
    residual_rows = rows if residual is None else _as_rows(residual)
    num_outer, num_inner, n = rows.shape
    block = triton.next_power_of_2(n)
    _rmsnorm_kernel[(num_outer * num_inner,)](
        rows,
        residual_rows,
        weight,
        out,
        out if h is None else h,
        rows.stride(0),
        rows.stride(1),
        residual_rows.stride(0),
        residual_rows.stride(1),
        num_inner,
        eps,
        N=n,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        UNIT_OFFSET=unit_offset,
        num_warps=min(16, max(1, block // 256)),
    )


def _as_rows(x: Tensor) -> Tensor:
    """[A, B, n] without a copy: heads of merged projections have rows at two strides."""
    return x[:, None] if x.dim() == 2 else x.view(-1, *x.shape[-2:])
