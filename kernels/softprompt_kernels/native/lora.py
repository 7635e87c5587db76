"""LoRA within products over packed weights: it is summed with them, and rounded once with the result."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.native.memory import PooledPages
from softprompt_kernels.native.panels import PANEL, pack_panels

# Panels that a product computes together.
_GROUP = 2
_ARRAYS = ("a", "b", "ranks", "scales", "slices", "places")


class _Table(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in _ARRAYS],
        *[(name, c_int32) for name in ("num_slices", "stride", "max_rank")],
    ]


class _Step(ctypes.Structure):
    _fields_ = [("order", c_void_p), ("tiles", c_void_p), ("num_tiles", c_int64), ("slots", c_void_p)]


class LoraStep:
    """The tiles of one step, on a CPU, where the kernels find them.

    Attributes:
        address: of the structure that they read.
    """

    def __init__(self, tiles: LoraTiles) -> None:
        self._tiles = tiles  # the structure has addresses only
        self._step = _Step(tiles.order.data_ptr(), tiles.tiles.data_ptr(), len(tiles.tiles))
        self.address = ctypes.addressof(self._step)


class PackedLoras:
    """The LoRAs of one product by slot, where its kernel finds them; none before `prepare`.

    Args:
        dtype: of the product, and so of what is kept: bfloat16 or float32.

    Attributes:
        address: of the structure that it reads.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._table = _Table()
        self.address = ctypes.addressof(self._table)

    @staticmethod
    def can_hold(widths: Sequence[int]) -> bool:
        """Whether linears of these widths, one beside the other, each begin with a panel."""
        return all(width % PANEL == 0 for width in widths[:-1])

    def prepare(
        self, widths: Sequence[int], *, gated: bool, num_slots: int, memory: Sequence[PooledPages]
    ) -> None:
        """Make room for LoRAs.

        Args:
            widths: columns of each linear that the product computes, one beside the other as `can_hold` allows,
                or, gated, panel by panel in turn.
            memory: for each slot, to be freed when the slot has been dropped here.
        """
        self._memory = memory
        self._num_bytes = [0] * num_slots
        self._num_slices = len(widths)
        count = num_slots * self._num_slices
        # Arrays, not tensors: a LoRA of many modules sets a thousand of their values.
        self._a, self._b = (c_void_p * count)(), (c_void_p * count)()
        self._ranks, self._scales = (c_int32 * count)(), (c_float * count)()
        panels = _lay_out(widths, gated=gated)
        self._slices, self._places = ((c_int32 * len(panels))(*column) for column in zip(*panels, strict=True))
        arrays: Sequence[Any] = (self._a, self._b, self._ranks, self._scales, self._slices, self._places)
        for name, array in zip(_ARRAYS, arrays, strict=True):
            setattr(self._table, name, ctypes.addressof(array))
        self._table.num_slices = self._num_slices
        self._table.stride = 1 if gated else _GROUP
        self._table.max_rank = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return sum(self._num_bytes)

    def put(self, slot: int, index: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Give an empty slot weights for the linear at `index`: a [rank, in], b [out, rank]."""
        at = slot * self._num_slices + index
        self._a[at], self._b[at] = self._pack(slot, a), self._pack(slot, b)
        self._scales[at] = scale
        self._ranks[at] = len(a)
        self._table.max_rank = max(self._table.max_rank, _whole_panels(len(a)))

    def _pack(self, slot: int, matrix: Tensor) -> int:
        """Lay a matrix out in the slot's memory; its address."""
        beside = 1 if self._dtype == torch.float32 else 2
        packed = pack_panels(native.loaded(), [matrix.to(self._dtype)], self._memory[slot], beside=beside)
        self._num_bytes[slot] += packed.nbytes
        return packed.data_ptr()

    def drop(self, slot: int) -> None:
        """Empty a slot."""
        if not self._num_bytes[slot]:
            return
        for at in range(slot * self._num_slices, (slot + 1) * self._num_slices):
            self._ranks[at] = 0
        self._num_bytes[slot] = 0
        self._table.max_rank = _whole_panels(max(self._ranks))


def _whole_panels(rank: int) -> int:
    return -(-rank // PANEL) * PANEL


def _lay_out(widths: Sequence[int], *, gated: bool) -> list[tuple[int, int]]:
    """The linear that each panel of a product belongs to, and its place among the linear's; (−1, 0): padding."""
    counts = [-(-width // PANEL) for width in widths]
    panels = [(index, place) for index, count in enumerate(counts) for place in range(count)]
    if gated:
        panels.sort(key=lambda panel: (panel[1], panel[0]))
    return panels + [(-1, 0)] * (-len(panels) % _GROUP)
