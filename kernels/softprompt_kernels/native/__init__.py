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

__all__ = ["CannotCompile", "is_loaded", "kv_write", "load", "paged_decode", "supports", "unload"]

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
    return (
        _library is not None and keys.dtype in _DTYPES and keys.shape[3] <= MAX_HEAD_DIM and keys.is_contiguous()
    )


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
