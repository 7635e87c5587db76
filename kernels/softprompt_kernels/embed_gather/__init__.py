"""Put soft-prompt rows into the batch's embeddings, in place.

Semantics:
    keep = src >= 0
    out[dst[keep]] = rows[src[keep]]

out   [T, hidden]           bf16/fp16/fp32, last stride 1, written
rows  [num_rows, hidden]    same dtype, last stride 1
dst   [n] int64             unique
src   [n] int64             −1 leaves the token alone
"""

import torch
from torch import Tensor

from softprompt_kernels.embed_gather.reference import embed_gather as _reference

__all__ = ["embed_gather"]


def embed_gather(out: Tensor, rows: Tensor, dst: Tensor, src: Tensor) -> None:
    """See the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(out, rows, dst, src)
    if out.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.embed_gather.kernel import embed_gather as _kernel

        _kernel(out, rows, dst, src)
    else:
        _reference(out, rows, dst, src)


def _check(out: Tensor, rows: Tensor, dst: Tensor, src: Tensor) -> None:
    if out.dim() != 2 or rows.dim() != 2 or out.shape[1] != rows.shape[1] or dst.shape != src.shape:
        raise ValueError(
            f"out {list(out.shape)}, rows {list(rows.shape)}, dst {list(dst.shape)}, src {list(src.shape)} "
            "do not fit together"
        )
    if out.dtype != rows.dtype:
        raise ValueError(f"out is {out.dtype}, rows are {rows.dtype}; they must be the same")
    if out.stride(1) != 1 or rows.stride(1) != 1:
        raise ValueError("out and rows must be dense in their last axis")
    if dst.dtype != torch.int64 or src.dtype != torch.int64:
        raise ValueError(f"dst is {dst.dtype}, src is {src.dtype}; they must be int64")
