"""CPU kernels in C, used where `load` could compile them; without them torch's operations do the same.

They are plain C over pointers: every shape, dtype and stride is checked here or by the operation that calls.
`ops.c`, `decode.c` with its parts, `layer.c` and `panels.c` are for any processor, `wide.c` and `wide_chunk.c` for
most, the others for those that multiply pairs of bfloat16 themselves. How threads share the work is in `team.h`.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.native.library import CannotCompile
from softprompt_kernels.native.library import load as _load
from softprompt_kernels.native.memory import HugePages
from softprompt_kernels.native.panels import PANEL, pack_panels

if TYPE_CHECKING:
    from softprompt_kernels.native.lora import LoraStep, PackedLoras

__all__ = [
    "CannotCompile",
    "argmax",
    "is_loaded",
    "linear",
    "load",
    "loaded",
    "lora_expand",
    "lora_shrink",
    "pack_bias",
    "pack_gated",
    "pack_gated_bias",
    "pack_linear",
    "rms_norm",
    "rope",
    "supports",
    "supports_chunks",
    "supports_linear",
    "supports_lora",
    "supports_rows",
    "supports_wide",
    "unload",
]

MAX_HEAD_DIM = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"identity": 0, "silu": 1, "gelu_tanh": 2}
_ROWS_AT_ONCE = 1024
_library: ctypes.CDLL | None = None
_weights = HugePages()


def load(cache_dir: Path) -> None:
    """Use the kernels from now on, in this whole process; compiles them where the cache has none (some seconds).

    Raises:
        CannotCompile: they cannot be had.
    """
    global _library
    library = _load(cache_dir)
    for prefix in (library.softprompt_paged_prefix, library.softprompt_wide_prefix):
        prefix.argtypes = [*[c_void_p] * 6, *[c_int64] * 4, *[c_int] * 4, c_float, c_int]
        prefix.restype = c_int
    library.softprompt_paged_decode.argtypes = [
        *[c_void_p] * 11,
        *[c_int64] * 4,
        *[c_int] * 6,
        c_float,
        c_float,
        c_int,
    ]
    library.softprompt_paged_decode.restype = c_int
    library.softprompt_kv_write.argtypes = [*[c_void_p] * 5, *[c_int64] * 5, *[c_int] * 3]
    library.softprompt_kv_write.restype = None
    library.softprompt_rms_norm.argtypes = [*[c_void_p] * 5, *[c_int64] * 7, c_int, c_int, c_float, c_int]
    library.softprompt_rms_norm.restype = c_int
    library.softprompt_rope.argtypes = [*[c_void_p] * 6, *[c_int64] * 7, *[c_int] * 6]
    library.softprompt_rope.restype = c_int
    library.softprompt_has_linear.restype = c_int
    library.softprompt_linear.argtypes = [*[c_void_p] * 5, *[c_int64] * 4, *[c_int] * 2, *[c_void_p] * 3, c_int]
    library.softprompt_linear.restype = c_int
    library.softprompt_has_wide.restype = c_int
    library.softprompt_wide_linear.argtypes = library.softprompt_linear.argtypes
    library.softprompt_wide_linear.restype = c_int
    for chunk in (library.softprompt_paged_chunk, library.softprompt_wide_chunk):
        chunk.argtypes = [*[c_void_p] * 5, *[c_int64] * 4, *[c_int] * 5, c_float, c_int]
        chunk.restype = c_int
    library.softprompt_layer_before.argtypes = [*[c_void_p] * 8, *[c_int64] * 3, c_int, *[c_void_p] * 2, c_int]
    library.softprompt_layer_before.restype = c_int
    library.softprompt_layer_after.argtypes = [*[c_void_p] * 7, c_int64, *[c_void_p] * 2, c_int]
    library.softprompt_layer_after.restype = c_int
    library.softprompt_layers.argtypes = [
        *[c_void_p] * 3,
        c_int64,
        *[c_void_p] * 5,
        *[c_int64] * 3,
        c_int,
        c_void_p,
        c_int,
    ]
    library.softprompt_layers.restype = c_int
    library.softprompt_argmax.argtypes = [c_void_p, c_void_p, *[c_int64] * 3, c_int, c_int]
    library.softprompt_argmax.restype = None
    library.softprompt_pack_panels.argtypes = [c_void_p, c_void_p, *[c_int64] * 4, c_int, c_int]
    library.softprompt_pack_panels.restype = None
    library.softprompt_lora_shrink_rows.argtypes = [*[c_void_p] * 7, *[c_int64] * 6, c_int, c_int]
    library.softprompt_lora_shrink_rows.restype = c_int
    library.softprompt_lora_expand_rows.argtypes = [*[c_void_p] * 7, *[c_int64] * 5, c_int, c_int]
    library.softprompt_lora_expand_rows.restype = None
    _library = library


def unload() -> None:
    """Go back to torch's operations."""
    global _library
    _library = None


def loaded() -> ctypes.CDLL:
    """The kernels in use."""
    assert _library is not None, "no kernels are loaded"
    return _library


def is_loaded() -> bool:
    """Whether the kernels are in use."""
    return _library is not None


def supports(keys: Tensor) -> bool:
    """Whether kernels are loaded that can work on such pages [P, page_size, Hkv, D]."""
    return supports_rows(keys) and keys.shape[3] <= MAX_HEAD_DIM and keys.is_contiguous()


def supports_chunks(keys: Tensor) -> bool:
    """Whether kernels are loaded for several queries of one sequence over such pages."""
    if not supports(keys):
        return False
    if keys.dtype == torch.float32:
        return keys.shape[3] % 16 == 0 and _has_wide()
    return keys.shape[3] % 32 == 0 and _has_tiles()


def _has_tiles() -> bool:
    """Whether this processor multiplies pairs of bfloat16."""
    return _library is not None and bool(_library.softprompt_has_linear())


def _has_wide() -> bool:
    """Whether this processor adds products of many floats in one instruction."""
    return _library is not None and bool(_library.softprompt_has_wide())


def supports_rows(x: Tensor) -> bool:
    """Whether kernels are loaded that can work on rows of this dtype."""
    return _library is not None and x.dtype in DTYPES


def argmax(x: Tensor) -> Tensor:
    """The first column of each row's largest value: [n] int64.

    It is −1 where a value is NaN, or the largest is not finite, or is the least number of float32.

    x  [n, m]  dense in its last axis, m at least 1
    """
    assert _library is not None
    columns = torch.empty(len(x), dtype=torch.int64)
    _library.softprompt_argmax(
        columns.data_ptr(), x.data_ptr(), *x.shape, x.stride(0), DTYPES[x.dtype], torch.get_num_threads()
    )
    return columns


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
        DTYPES[x.dtype],
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
    failed = _library.softprompt_rope(
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
        DTYPES[q.dtype],
        DTYPES[cos.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("a rotation found no memory for its threads")
    return q_out, k_out


def supports_lora(x: Tensor, weights: Tensor) -> bool:
    """Whether kernels are loaded for LoRAs of these weights, which x is multiplied with or added to."""
    return supports_rows(x) and weights.dtype == torch.float32


def lora_shrink(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles) -> Tensor:
    """Arguments as in `softprompt_kernels.lora_shrink`, a in float32. A token has the same values in any batch."""
    assert _library is not None
    h = torch.empty((len(tiles.order), *a.shape[1:3]), dtype=torch.float32)
    failed = _library.softprompt_lora_shrink_rows(
        h.data_ptr(),
        x.data_ptr(),
        a.data_ptr(),
        scales.data_ptr(),
        ranks.data_ptr(),
        tiles.order.data_ptr(),
        tiles.tiles.data_ptr(),
        len(tiles.tiles),
        *h.shape,
        x.shape[1],
        x.stride(0),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("LoRA found no memory for a row")
    return h


def lora_expand(out: Tensor, h: Tensor, b: Tensor, ranks: Tensor, starts: Tensor, tiles: LoraTiles) -> None:
    """Arguments as in `softprompt_kernels.lora_expand`, h and b in float32. Each token by itself, as above."""
    assert _library is not None
    _library.softprompt_lora_expand_rows(
        out.data_ptr(),
        h.data_ptr(),
        b.data_ptr(),
        ranks.data_ptr(),
        starts.data_ptr(),
        tiles.order.data_ptr(),
        tiles.tiles.data_ptr(),
        len(tiles.tiles),
        *h.shape,
        out.stride(0),
        DTYPES[out.dtype],
        torch.get_num_threads(),
    )


def supports_linear(weight: Tensor) -> bool:
    """Whether kernels are loaded, and this processor has the instructions, for such weights [out, in]."""
    if _library is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    return weight.shape[1] % 2 == 0 and _has_tiles()


def pack_linear(weight: Tensor) -> Tensor:
    """Weights [out, in] as `linear` reads them, in bfloat16: [panels, in / 2, 16, 2], or [panels, in, 16, 1] for
    products in float32; padded with zeros to pairs of panels."""
    return _pack(weight, together=2)


def pack_gated(gate: Tensor, up: Tensor) -> Tensor:
    """Both weights [out, in] as `linear` reads them when `gated`: their panels take turns."""
    return _pack(gate, up)


def _pack(*weights: Tensor, together: int = 1) -> Tensor:
    beside = 1 if weights[0].dtype == torch.float32 else 2
    in_bfloat16 = [weight.bfloat16() for weight in weights]
    return pack_panels(loaded(), in_bfloat16, _weights, beside=beside, together=together)


def pack_bias(bias: Tensor) -> Tensor:
    """A bias [out] beside `pack_linear`'s weights: [panels * 16] float32."""
    return F.pad(bias.float(), (0, -len(bias) % (2 * PANEL)))


def pack_gated_bias(gate: Tensor, up: Tensor) -> Tensor:
    """Both biases [out] beside `pack_gated`'s weights: [panels * 16] float32."""
    both = [F.pad(bias.float(), (0, -len(bias) % PANEL)).view(-1, PANEL) for bias in (gate, up)]
    return torch.stack(both, 1).flatten()


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    *,
    columns: int,
    activation: str = "identity",
    gated: bool = False,
    loras: "PackedLoras | None" = None,
    step: "LoraStep | None" = None,
) -> Tensor:
    """act(x @ weight.T + bias), or, gated, act(x @ gate.T) * (x @ up.T): [..., columns] like x.

    Sums are made in float32, and each row's in the same order however many there are. With `loras`, those that the
    step's rows use change weight, or gate and up.

    x       [..., in]               bfloat16, or float32
    packed  by `pack_linear`, or by `pack_gated`, of weights in x's dtype
    bias    [panels * 16] float32   in the columns' order of `packed`, or None
    loras   in x's dtype
    """
    assert _library is not None
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype)
    multiply = _library.softprompt_wide_linear if x.dtype == torch.float32 else _library.softprompt_linear
    failed = multiply(
        out.data_ptr(),
        rows.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        rows.shape[0],
        rows.stride(0),
        columns,
        packed.shape[1],
        ACTIVATIONS[activation],
        gated,
        None if loras is None else loras.address,
        None if step is None else step.address,
        None,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("a product found no memory for LoRA")
    return out


def supports_wide(weight: Tensor) -> bool:
    """Whether kernels are loaded for products in float32 with such weights [out, in], which bfloat16 must hold."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not _has_wide():
        return False
    # Some rows at a time: copies of a whole head may be gigabytes.
    starts = range(0, len(weight), _ROWS_AT_ONCE)
    parts = (weight[start : start + _ROWS_AT_ONCE] for start in starts)
    return all(torch.equal(rows, rows.bfloat16().float()) for rows in parts)
