"""The memory of KV pages: one tensor for all layers of one shape, so that one copy serves them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_inference.engine.plan import PageCopy


class KVPages:
    """Keys and values of all layers, empty when made.

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
        self._page_size = page_size
        self._device = device
        # Layers of one shape: [layers, 2, num_pages, page_size, Hkv, D]. Most models have one shape.
        self._groups = {
            shape: torch.zeros((shapes.count(shape), 2, num_pages, page_size, *shape), dtype=dtype, device=device)
            for shape in dict.fromkeys(shapes)
        }
        self._places = [(shape, shapes[:layer].count(shape)) for layer, shape in enumerate(shapes)]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, views: [num_pages, page_size, Hkv, D], contiguous."""
        shape, place = self._places[index]
        keys, values = self._groups[shape][place]
        return keys, values

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy rows between pages, in all layers; the rules of `StepPlan.copies` hold."""
        if not copies:
            return
        sources, targets = (
            torch.tensor(slots, dtype=torch.int64).to(self._device, non_blocking=True)
            for slots in (
                [copy.source * self._page_size + row for copy in copies for row in range(copy.num_positions)],
                [copy.target * self._page_size + row for copy in copies for row in range(copy.num_positions)],
            )
        )
        for group in self._groups.values():
            rows = group.flatten(2, 3)  # [layers, 2, num_pages * page_size, Hkv, D]
            rows.index_copy_(2, targets, rows.index_select(2, sources))
