"""Triton kernel of `rope`: one program per (token, block of query and key heads)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_PROGRAM = 1024


@triton.jit
def turn(first, second, cos_ptr, sin_ptr, token, cos_stride, sin_stride, dims, dim_mask, HALF: tl.constexpr):
    """Halves of one token's heads, [BLOCK_H, BLOCK_HALF] float32 each, turned by its row of the tables [T, D]."""
    cos_offsets = token * cos_stride + dims
    sin_offsets = token * sin_stride + dims
    cos_first = tl.load(cos_ptr + cos_offsets, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + cos_offsets + HALF, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + sin_offsets, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + sin_offsets + HALF, mask=dim_mask, other=0.0).to(tl.float32)[None, :]
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def _rope_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, Hkv, D]
    cos_ptr,  # [T, D]
    sin_ptr,  # [T, D]
    q_out_ptr,  # [T, H, D], contiguous
    k_out_ptr,  # [T, Hkv, D], contiguous
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    cos_stride,
    sin_stride,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    BLOCK_H: tl.constexpr,  # heads per program
    BLOCK_HALF: tl.constexpr,  # ≥ HALF
):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_HALF)
    dim_mask = dims < HALF

    # The heads of the queries come first, then those of the keys: a lane works on one of the two.
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    q_mask = (head < H)[:, None] & dim_mask[None, :]
    q_offsets = token * q_stride_t + head[:, None] * q_stride_h + dims[None, :]
    kv_head = head - H
    k_mask = ((kv_head >= 0) & (kv_head < KV_HEADS))[:, None] & dim_mask[None, :]
    k_offsets = token * k_stride_t + kv_head[:, None] * k_stride_h + dims[None, :]
    first = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0).to(tl.float32)
    first += tl.load(k_ptr + k_offsets, mask=k_mask, other=0.0).to(tl.float32)
    second = tl.load(q_ptr + q_offsets + HALF, mask=q_mask, other=0.0).to(tl.float32)
    second += tl.load(k_ptr + k_offsets + HALF, mask=k_mask, other=0.0).to(tl.float32)

    first, second = turn(first, second, cos_ptr, sin_ptr, token, cos_stride, sin_stride, dims, dim_mask, HALF)
    out_first = first.to(q_out_ptr.dtype.element_ty)
    out_second = second.to(q_out_ptr.dtype.element_ty)
    q_out_offsets = (token * H + head)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(q_out_ptr + q_out_offsets, out_first, mask=q_mask)
    tl.store(q_out_ptr + q_out_offsets + HALF, out_second, mask=q_mask)
    k_out_offsets = (token * KV_HEADS + kv_head)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(k_out_ptr + k_out_offsets, out_first, mask=k_mask)
    tl.store(k_out_ptr + k_out_offsets + HALF, out_second, mask=k_mask)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments as in `softprompt_kernels.rope`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if num_tokens == 0:
        return q_out, k_out
    block_half = triton.next_power_of_2(head_dim // 2)
    all_heads = num_heads + num_kv_heads
    block_h = min(triton.next_power_of_2(all_heads), max(1, VALUES_PER_PROGRAM // block_half))
    _rope_kernel[(num_tokens, triton.cdiv(all_heads, block_h))](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        cos.stride(0),
        sin.stride(0),
        H=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
    )
    return q_out, k_out
