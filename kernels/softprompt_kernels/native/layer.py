"""A decoder layer of Llama's shape but for its attention, in bfloat16: one call before it and one after."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels import native


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
        *[(name, c_int) for name in ("activation", "num_heads", "num_kv_heads", "head_dim")],
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
    loras: native.PackedLoras


class DecoderLayer:
    """h = x + out(attention(rope(qkv(norm(x))))), then h + down(act(gate(norm(h))) * up(norm(h))).

    Args:
        norms: before the attention, and between it and the MLP.
        qkv: queries, keys and values side by side.
        gated: gate and up together.
        activation: one of `native.ACTIVATIONS`.
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
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        # The structure has addresses only.
        self._weights: Sequence[object] = (norms, qkv, out, gated, down)
        self._heads = (num_heads, num_kv_heads, head_dim)
        self._columns = (qkv.columns, gated.columns)
        self._layer = _Layer(
            *(_Norm(norm.weight.data_ptr(), norm.eps, norm.unit_offset) for norm in norms),
            *(_linear(part) for part in (qkv, out, gated, down)),
            native.ACTIVATIONS[activation],
            *self._heads,
        )
        self._pointer = ctypes.addressof(self._layer)

    def before(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, step: native.LoraStep | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], and keys and values [T, Hkv, D], of hidden states.

        hidden    [T, hidden] bfloat16   contiguous
        cos, sin  [T, D]                 dense rows
        step                             which LoRAs the tokens use; None: none
        """
        rows = len(hidden)
        num_heads, num_kv_heads, dim = self._heads
        q = torch.empty(rows, num_heads, dim, dtype=torch.bfloat16)
        k = torch.empty(rows, num_kv_heads, dim, dtype=torch.bfloat16)
        qkv = torch.empty(rows, self._columns[0], dtype=torch.bfloat16)
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
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("a norm found no memory for a row")
        return q, k, qkv[:, -num_kv_heads * dim :].view(rows, num_kv_heads, dim)

    def after(self, attended: Tensor, hidden: Tensor, step: native.LoraStep | None = None) -> Tensor:
        """The layer's answer [T, hidden].

        attended      [T, H, D]     contiguous
        hidden, step  [T, hidden]   as given to `before`
        """
        rows = len(hidden)
        out, total, normed = (torch.empty_like(hidden) for _ in range(3))
        gated = torch.empty(rows, self._columns[1], dtype=torch.bfloat16)
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
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("a norm found no memory for a row")
        return out


def _linear(part: LinearWeights) -> _Linear:
    bias = None if part.bias is None else part.bias.data_ptr()
    return _Linear(part.packed.data_ptr(), bias, part.columns, 2 * part.packed.shape[1], part.loras.address)
