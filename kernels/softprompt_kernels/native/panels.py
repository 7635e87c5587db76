"""How the products in C want a matrix: in panels of columns, where some inputs lie side by side."""

from torch import Tensor

PANEL = 16


def pack_panels(weight: Tensor, *, together: int = 1, beside: int = 2) -> Tensor:
    """[columns, size] → [panels, size / beside, 16, beside]; zeros fill it to multiples of both."""
    columns, size = weight.shape
    panels = -(-columns // (together * PANEL)) * together
    padded = weight.new_zeros(panels * PANEL, size + -size % beside)
    padded[:columns, :size] = weight
    return padded.view(panels, PANEL, -1, beside).transpose(1, 2)
