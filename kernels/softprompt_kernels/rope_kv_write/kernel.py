"""Triton kernel of `rope_kv_write`: one program per (token, block of query, key and value heads)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_kernels.rope.kernel import VALUES_PER_PROGRAM, turn


@triton.jit
def _rope_kv_write_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    cos_ptr,  # [T, D]
    sin_ptr,  # [T, D]
    keys_ptr,  # [P * page_size, Hkv, D], contiguous
    values_ptr,  # [P * page_size, Hkv, D], contiguous
    slots_ptr,  # [T] int64
    out_ptr,  # [T, H, D], contiguous
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
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

    # First the heads of the queries, then of the keys, then of the values: a lane works on one of them.
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k_head = head - H
    v_head = k_head - KV_HEADS
    q_mask = (head < H)[:, None] & dim_mask[None, :]
    k_mask = ((k_head >= 0) & (k_head < KV_HEADS))[:, None] & dim_mask[None, :]
    v_mask = ((v_head >= 0) & (v_head < KV_HEADS))[:, None] & dim_mask[None, :]
    q_offsets = token * q_stride_t + head[:, None] * q_stride_h + dims[None, :]
    k_offsets = token * k_stride_t + k_head[:, None] * k_stride_h + dims[None, :]
    v_offsets = token * v_stride_t + v_head[:, None] * v_stride_h + dims[None, :]
    first = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0).to(tl.float32)
    first += tl.load(k_ptr + k_offsets, mask=k_mask, other=0.0).to(tl.float32)
    second = tl.load(q_ptr + q_offsets + HALF, mask=q_mask, other=0.0).to(tl.float32)
    second += tl.load(k_ptr + k_offsets + HALF, mask=k_mask, other=0.0).to(tl.float32)
    v_first = tl.load(v_ptr + v_offsets, mask=v_mask, other=0.0)
    v_second = tl.load(v_ptr + v_offsets + HALF, mask=v_mask, other=0.0)

    first, second = turn(first, second, cos_ptr, sin_ptr, token, cos_stride, sin_stride, dims, dim_mask, HALF)
    out_first = first.to(out_ptr.dtype.element_ty)
    out_second = second.to(out_ptr.dtype.element_ty)
    out_offsets = (token * H + head)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(out_ptr + out_offsets, out_first, mask=q_mask)
    tl.store(out_ptr + out_offsets + HALF, out_second, mask=q_mask)
    slot = tl.load(slots_ptr + token)
    k_out_offsets = (slot * KV_HEADS + k_head)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(keys_ptr + k_out_offsets, out_first, mask=k_mask)
    tl.store(keys_ptr + k_out_offsets + HALF, out_second, mask=k_mask)
    v_out_offsets = (slot * KV_HEADS + v_head)[:, None] * (2 * HALF) + dims[None, :]
    tl.store(values_ptr + v_out_offsets, v_first, mask=v_mask)
    tl.store(values_ptr + v_out_offsets + HALF, v_second, mask=v_mask)


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Launch the kernel; arguments as in `softprompt_kernels.rope_kv_write`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    block_half = triton.next_power_of_2(head_dim // 2)
    all_heads = num_heads + 2 * num_kv_heads
    block_h = min(triton.next_power_of_2(all_heads), max(1, VALUES_PER_PROGRAM // block_half))
    _rope_kv_write_kernel[(num_tokens, triton.cdiv(all_heads, block_h))](
        q,
        k,
        v,
        cos,
        sin,
        keys,
        values,
        slots,
        out,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        H=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_H=block_h,
        BLOCK_HALF=block_half,
    )
    return out
