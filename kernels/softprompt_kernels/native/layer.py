"""Decoder layers of Llama's shape, in 16 or 32 bits: one but for its attention, or several in a row with it."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.native.lora import LoraStep, PackedLoras
from softprompt_kernels.paged_attention.reference import Plan


class _Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_float), ("unit_offset", c_int)]


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("columns", c_int64),
        ("size", c_int64),
        ("loras", c_void_p),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("before", _Norm),
        ("between", _Norm),
        ("qkv", _Linear),
        ("out", _Linear),
        ("gated", _Linear),
        ("down", _Linear),
        *[(name, c_int) for name in ("activation", "num_heads", "num_kv_heads", "head_dim", "dtype")],
        ("scale", c_float),
        ("window", c_int),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("slots", "page_table", "rows", "sequences", "ends", "starts")],
        *[(name, c_void_p) for name in ("chunks", "prefixes")],
        *[(name, c_int64) for name in ("num_decodes", "num_chunks", "num_prefixes", "table_width")],
        ("page_size", c_int),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormWeights:
    """An RMS norm: x / rms(x) times the weight [hidden], or times one more than the weight."""

    weight: Tensor
    eps: float
    unit_offset: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """A linear as `native.pack_linear`, `pack_bias` or their gated forms laid it out.

    Attributes:
        columns: of its result.
        loras: that may change it.
    """

    packed: Tensor
    bias: Tensor | None
    columns: int
    loras: PackedLoras


class DecoderLayer:
    """h = x + out(attention(rope(qkv(norm(x))))), then h + down(act(gate(norm(h))) * up(norm(h))).

    Args:
        norms: before the attention, and between it and the MLP.
        qkv: queries, keys and values side by side.
        gated: gate and up together.
        activation: one of `native.ACTIVATIONS`.
        dtype: of the hidden states, and so of everything but the weights.
        scale: of the attention's scores.
        sliding_window: positions a query sees, itself among them; None: all.
    """

    def __init__(
        self,
        *,
        norms: tuple[NormWeights, NormWeights],
        qkv: LinearWeights,
        out: LinearWeights,
        gated: LinearWeights,
        down: LinearWeights,
        activation: str,
        dtype: torch.dtype,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None,
    ) -> None:
        # The structure has addresses only.
        self._weights: Sequence[object] = (norms, qkv, out, gated, down)
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._columns = (qkv.columns, gated.columns)
        self.dtype = dtype
        self._layer = _Layer(
            *(_Norm(norm.weight.data_ptr(), norm.eps, norm.unit_offset) for norm in norms),
            *(_linear(part) for part in (qkv, out, gated, down)),
            native.ACTIVATIONS[activation],
            *self._heads,
            native.DTYPES[dtype],
            scale,
            sliding_window or 0,
        )
        self._pointer = ctypes.addressof(self._layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Heads, key heads, head dimension, columns of the products for all three, of the gate's, hidden size."""
        return (*self._heads, *self._columns, self._layer.out.columns)

    def before(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, step: LoraStep | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], and keys and values [T, Hkv, D], of hidden states.

        hidden    [T, hidden]   contiguous
        cos, sin  [T, D]        dense rows
        step                    which LoRAs the tokens use; None: none
        """
        rows = len(hidden)
        num_heads, num_kv_heads, dim = self._heads
        q = torch.empty(rows, num_heads, dim, dtype=self.dtype)
        k = torch.empty(rows, num_kv_heads, dim, dtype=self.dtype)
        qkv = torch.empty(rows, self._columns[0], dtype=self.dtype)
        normed = torch.empty_like(hidden)
        failed = native.loaded().softprompt_layer_before(
            self._pointer,
            q.data_ptr(),
            k.data_ptr(),
            qkv.data_ptr(),
            normed.data_ptr(),
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            cos.stride(0),
            sin.stride(0),
            native.DTYPES[cos.dtype],
            None if step is None else step.address,
            None,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("a layer found no memory for its threads' rows")
        return q, k, qkv[:, -num_kv_heads * dim :].view(rows, num_kv_heads, dim)

    def after(self, attended: Tensor, hidden: Tensor, step: LoraStep | None = None) -> Tensor:
        """The layer's answer [T, hidden].

        attended      [T, H, D]     contiguous
        hidden, step  [T, hidden]   as given to `before`
        """
        rows = len(hidden)
        out, total, normed = (torch.empty_like(hidden) for _ in range(3))
        gated = torch.empty(rows, self._columns[1], dtype=self.dtype)
        failed = native.loaded().softprompt_layer_after(
            self._pointer,
            out.data_ptr(),
            total.data_ptr(),
            normed.data_ptr(),
            gated.data_ptr(),
            attended.data_ptr(),
            hidden.data_ptr(),
            rows,
            None if step is None else step.address,
            None,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("a layer found no memory for its threads' rows")
        return out


class DecoderLayers:
    """Layers of one shape and dtype, each of which takes what the one before it answers; one call for all of them.

    Raises ValueError where their shapes or dtypes differ.
    """

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        if len({(*layer.shape, layer.dtype) for layer in layers}) != 1:
            raise ValueError(f"layers of one shape are needed, not of {sorted({each.shape for each in layers})}")
        self._weights = tuple(layers)
        self._layers = (_Layer * len(layers))(*(layer._layer for layer in layers))

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        pages: Sequence[tuple[Tensor, Tensor]],
        *,
        slots: Tensor,
        page_table: Tensor,
        plan: Plan,
        loras: LoraStep | None = None,
    ) -> Tensor:
        """The last layer's answer [T, hidden]; keys and values are written.

        hidden    [T, hidden]   contiguous
        cos, sin  [T, D]        dense rows
        pages                   keys and values of each layer, which `native.supports`
        plan                    of `paged_attention`, without groups
        loras                   which LoRAs the tokens use; None: none

        The others as in `paged_attention` and `kv_write`.
        """
        assert not plan.groups, "torch's part of a plan is not done here"
        rows, (keys, values) = len(hidden), zip(*pages, strict=True)
        decodes = plan.decodes
        chunks = torch.tensor([(each.sequence, each.start, each.stop, each.context) for each in plan.chunks])
        prefixes = torch.tensor(
            [(each.rows.data_ptr(), each.pages.data_ptr(), len(each.rows), each.length) for each in plan.prefixes]
        )
        step = _Step(
            slots=slots.data_ptr(),
            page_table=page_table.data_ptr(),
            rows=None if decodes is None else decodes.rows.data_ptr(),
            sequences=None if decodes is None else decodes.sequences.data_ptr(),
            ends=None if decodes is None else decodes.ends.data_ptr(),
            starts=None if decodes is None or decodes.starts is None else decodes.starts.data_ptr(),
            chunks=chunks.data_ptr(),
            prefixes=prefixes.data_ptr(),
            num_decodes=0 if decodes is None else len(decodes.rows),
            num_chunks=len(chunks),
            num_prefixes=len(prefixes),
            table_width=page_table.shape[1],
            page_size=keys[0].shape[1],
        )
        out = torch.empty_like(hidden)
        failed = native.loaded().softprompt_layers(
            self._layers,
            _pointers(keys),
            _pointers(values),
            len(self._layers),
            ctypes.byref(step),
            out.data_ptr(),
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rows,
            cos.stride(0),
            sin.stride(0),
            native.DTYPES[cos.dtype],
            None if loras is None else loras.address,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("a step found no memory for a row or a context")
        return out


def _pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[c_void_p]":
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _linear(part: LinearWeights) -> _Linear:
    bias = None if part.bias is None else part.bias.data_ptr()
    size = part.packed.shape[1] * part.packed.shape[3]
    return _Linear(part.packed.data_ptr(), bias, part.columns, size, part.loras.address)
