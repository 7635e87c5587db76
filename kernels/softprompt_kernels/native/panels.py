"""How the products in C want a matrix: in panels of columns, where pairs of inputs lie side by side."""

from torch import Tensor

PANEL = 16


def pack_panels(weight: Tensor, *, together: int = 1) -> Tensor:
    """[columns, size] → [panels, size / 2, 16, 2]; zeros fill the last pair and multiples of `together` panels."""
    columns, size = weight.shape
    panels = -(-columns // (together * PANEL)) * together
    padded = weight.new_zeros(panels * PANEL, size + size % 2)
    padded[:columns, :size] = weight
    return padded.view(panels, PANEL, -1, 2).transpose(1, 2)
