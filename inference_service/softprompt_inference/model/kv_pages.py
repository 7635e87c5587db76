"""The memory of KV pages: one tensor for all layers of one shape, so that one copy serves them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_inference.engine.plan import PageCopy


class KVPages:
    """Keys and values of all layers. What no step has written yet may be anything.

    Args:
        shapes: (key heads, head dimension) of each layer, in the layers' order.
        num_pages: pages with ids 0 … num_pages − 1.
        page_size: positions in one page.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # On a CPU, memory that is not written is not taken from others: pages count when they are first used.
        make = torch.empty if device.type == "cpu" else torch.zeros
        # Layers of one shape: [layers, 2, num_pages, page_size, Hkv, D]. Most models have one shape.
        self._groups = {
            shape: make((shapes.count(shape), 2, num_pages, page_size, *shape), dtype=dtype, device=device)
            for shape in dict.fromkeys(shapes)
        }
        self._places = [(shape, shapes[:layer].count(shape)) for layer, shape in enumerate(shapes)]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, views: [num_pages, page_size, Hkv, D], contiguous."""
        shape, place = self._places[index]
        keys, values = self._groups[shape][place]
        return keys, values

    def write(self, key_values: Tensor, slots: Tensor) -> None:
        """Write rows of positions, in all layers, which must have one shape.

        key_values  [layers, 2, n, Hkv, D]
        slots       [n] int64               page * page_size + offset, unique
        """
        [group] = self._groups.values()
        group.flatten(2, 3)[:, :, slots] = key_values

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy rows between pages, in all layers; the rules of `StepPlan.copies` hold."""
        for group in self._groups.values():
            for copy in copies:
                group[:, :, copy.target, : copy.num_positions] = group[:, :, copy.source, : copy.num_positions]
