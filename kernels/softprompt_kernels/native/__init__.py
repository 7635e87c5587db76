"""CPU kernels in C, used where `load` could compile them; without them torch's operations do the same.

`ops.c` is plain C over pointers: every shape, dtype and stride is checked here or by the operation that calls.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from softprompt_kernels.native.library import CannotCompile
from softprompt_kernels.native.library import load as _load

__all__ = [
    "CannotCompile",
    "is_loaded",
    "kv_write",
    "load",
    "paged_decode",
    "rms_norm",
    "rope",
    "supports",
    "supports_rows",
    "unload",
]

MAX_HEAD_DIM = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_library: ctypes.CDLL | None = None


def load(cache_dir: Path) -> None:
    """Use the kernels from now on, in this whole process; compiles them where the cache has none (some seconds).

    Raises:
        CannotCompile: they cannot be had.
    """
    global _library
    library = _load(cache_dir)
    pointers = [c_void_p] * 9
    library.softprompt_paged_decode.argtypes = [*pointers, *[c_int64] * 4, *[c_int] * 6, c_float, c_float, c_int]
    library.softprompt_paged_decode.restype = c_int
    library.softprompt_kv_write.argtypes = [*[c_void_p] * 5, *[c_int64] * 5, *[c_int] * 3]
    library.softprompt_kv_write.restype = None
    library.softprompt_rms_norm.argtypes = [*[c_void_p] * 5, *[c_int64] * 7, c_int, c_int, c_float, c_int]
    library.softprompt_rms_norm.restype = c_int
    library.softprompt_rope.argtypes = [*[c_void_p] * 6, *[c_int64] * 7, *[c_int] * 6]
    library.softprompt_rope.restype = None
    _library = library


def unload() -> None:
    """Go back to torch's operations."""
    global _library
    _library = None


def is_loaded() -> bool:
    """Whether the kernels are in use."""
    return _library is not None


def supports(keys: Tensor) -> bool:
    """Whether kernels are loaded that can work on such pages [P, page_size, Hkv, D]."""
    return supports_rows(keys) and keys.shape[3] <= MAX_HEAD_DIM and keys.is_contiguous()


def supports_rows(x: Tensor) -> bool:
    """Whether kernels are loaded that can work on rows of this dtype."""
    return _library is not None and x.dtype in _DTYPES


def paged_decode(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    rows: Tensor,
    sequences: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Attention of sequences with one query each; arguments as in `softprompt_kernels.paged_attention` and

    out        [T, H, D]   contiguous, like q; written at `rows`
    rows       [n] int32   rows of q and out
    sequences  [n] int32   their sequences
    """
    assert _library is not None
    scores = None if sinks is None else sinks.float().contiguous()
    failed = _library.softprompt_paged_decode(
        out.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_table.data_ptr(),
        context_lens.data_ptr(),
        rows.data_ptr(),
        sequences.data_ptr(),
        None if scores is None else scores.data_ptr(),
        len(rows),
        page_table.shape[1],
        q.stride(0),
        q.stride(1),
        q.shape[1],
        keys.shape[2],
        keys.shape[3],
        keys.shape[1],
        _DTYPES[q.dtype],
        sliding_window or 0,
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for its scores")


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Arguments as in `softprompt_kernels.kv_write`."""
    assert _library is not None
    _library.softprompt_kv_write(
        keys.data_ptr(),
        values.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        slots.data_ptr(),
        len(slots),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.shape[2],
        keys.shape[3],
        keys.element_size(),
    )


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """(out, h) of `softprompt_kernels.rmsnorm`; without a residual, h is x."""
    assert _library is not None
    out = torch.empty(x.shape, dtype=x.dtype)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rows = _rows(x)
    others = rows if residual is None else _rows(residual)
    failed = _library.softprompt_rms_norm(
        out.data_ptr(),
        h.data_ptr(),
        rows.data_ptr(),
        None if residual is None else others.data_ptr(),
        weight.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        rows.shape[2],
        rows.stride(0),
        rows.stride(1),
        others.stride(0),
        others.stride(1),
        _DTYPES[x.dtype],
        unit_offset,
        eps,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("a norm found no memory for a row")
    return out, h


def _rows(x: Tensor) -> Tensor:
    """[..., m, n] → [outer, m, n]"""
    if x.dim() == 3:
        return x
    return x[None] if x.dim() == 2 else x.flatten(0, -3)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as in `softprompt_kernels.rope`, and D at most MAX_HEAD_DIM."""
    assert _library is not None
    num_tokens, num_heads, dim = q.shape
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    _library.softprompt_rope(
        q_out.data_ptr(),
        k_out.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        num_tokens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        cos.stride(0),
        sin.stride(0),
        num_heads,
        k.shape[1],
        dim,
        _DTYPES[q.dtype],
        _DTYPES[cos.dtype],
        torch.get_num_threads(),
    )
    return q_out, k_out
