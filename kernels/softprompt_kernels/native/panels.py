"""How the products in C want a matrix: in panels of columns, where some inputs lie side by side."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_kernels.native.memory import Regions

PANEL = 16


def pack_panels(
    library: ctypes.CDLL, matrices: Sequence[Tensor], memory: Regions, *, beside: int, together: int = 1
) -> Tensor:
    """[columns, size] → [panels, size / beside, 16, beside]; zeros fill it to multiples of both.

    Args:
        library: the kernels.
        matrices: of one shape and dtype, in 16 or 32 bits; their panels take turns.
        memory: for the result.
        beside: inputs that lie side by side; they have 16 or 32 bits together.
        together: each matrix has a multiple of so many panels.
    """
    (columns, size), dtype = matrices[0].shape, matrices[0].dtype
    panels, units = -(-columns // (together * PANEL)) * together, -(-size // beside)
    packed = memory.empty((len(matrices) * panels, units, PANEL, beside), dtype)
    unit_bytes = beside * dtype.itemsize
    panel_bytes = units * PANEL * unit_bytes
    for index, matrix in enumerate(matrices):
        rows = matrix.contiguous()
        library.softprompt_pack_panels(
            packed.data_ptr() + index * panel_bytes,
            rows.data_ptr(),
            columns,
            size * dtype.itemsize,
            panels,
            len(matrices) * panel_bytes,
            unit_bytes,
            torch.get_num_threads(),
        )
    return packed
