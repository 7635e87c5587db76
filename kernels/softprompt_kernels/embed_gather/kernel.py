"""Triton kernel of `embed_gather`: one program per (virtual token, block of columns)."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed_gather_kernel(
    out_ptr,  # [T, hidden]
    rows_ptr,  # [num_rows, hidden]
    dst_ptr,  # [n] int64
    src_ptr,  # [n] int64
    hidden,
    out_stride,
    rows_stride,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    src = tl.load(src_ptr + i)
    if src < 0:
        return
    dst = tl.load(dst_ptr + i)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    row = tl.load(rows_ptr + src * rows_stride + columns, mask=mask)
    tl.store(out_ptr + dst * out_stride + columns, row, mask=mask)


def embed_gather(out: Tensor, rows: Tensor, dst: Tensor, src: Tensor) -> None:
    """Launch the kernel; arguments as in `softprompt_kernels.embed_gather`."""
    if dst.shape[0] == 0:
        return
    hidden = out.shape[1]
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (dst.shape[0], triton.cdiv(hidden, block))
    _embed_gather_kernel[grid](out, rows, dst, src, hidden, out.stride(0), rows.stride(0), BLOCK=block)
