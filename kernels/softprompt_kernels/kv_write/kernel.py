"""Triton kernel of `kv_write`: one program per token."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_write_kernel(
    keys_ptr,  # [P * page_size, Hkv * D], contiguous
    values_ptr,  # [P * page_size, Hkv * D], contiguous
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    slots_ptr,  # [T] int64
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    D: tl.constexpr,
    ROW: tl.constexpr,  # Hkv * D
    BLOCK: tl.constexpr,  # ≥ ROW
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    columns = tl.arange(0, BLOCK)
    mask = columns < ROW
    head = columns // D
    dim = columns % D
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + dim, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + dim, mask=mask)
    tl.store(keys_ptr + slot * ROW + columns, k, mask=mask)
    tl.store(values_ptr + slot * ROW + columns, v, mask=mask)


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Launch the kernel; arguments as in `softprompt_kernels.kv_write`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    row = num_kv_heads * head_dim
    _kv_write_kernel[(num_tokens,)](
        keys,
        values,
        k,
        v,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        D=head_dim,
        ROW=row,
        BLOCK=triton.next_power_of_2(row),
    )
