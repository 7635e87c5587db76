"""How the products in C want a matrix: in panels of columns, input by input or two inputs side by side."""

from torch import Tensor

PANEL = 16


def pack_panels(weight: Tensor, *, together: int = 1) -> Tensor:
    """[columns, size] → [panels, size / 2, 16, 2]; zeros fill the last pair and multiples of `together` panels."""
    columns, size = weight.shape
    panels = -(-columns // (together * PANEL)) * together
    padded = weight.new_zeros(panels * PANEL, size + size % 2)
    padded[:columns, :size] = weight
    return padded.view(panels, PANEL, -1, 2).transpose(1, 2)


def pack_wide_panels(weight: Tensor) -> Tensor:
    """[columns, size] → [panels, size, 16]; zeros fill the last panel."""
    columns, size = weight.shape
    panels = -(-columns // PANEL)
    padded = weight.new_zeros(panels * PANEL, size)
    padded[:columns] = weight
    return padded.view(panels, PANEL, size).transpose(1, 2)
