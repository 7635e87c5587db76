"""Memory in huge pages, for weights that every step reads from end to end.

Where an ordinary page of 4 KB ends, so does what the processor reads ahead, and the next has to be looked up; in a
virtual machine, twice.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

_REGION_BYTES = 64 * 2**20
_ALIGNMENT = 64


class HugePages:
    """Gives out parts of large regions. A region is given back when the last tensor in it is gone.

    Args:
        region_bytes: of each; None: many.
    """

    def __init__(self, region_bytes: int | None = None) -> None:
        self._region_bytes = region_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, in huge pages where the system has some."""
        size = tensor.numel() * tensor.element_size()
        taken = math.ceil(size / _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._left):
            self._left = _map(max(taken, self._region_bytes or _REGION_BYTES))
        place, self._left = self._left[:size], self._left[taken:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _map(size: int) -> Tensor:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A system without them says so; ordinary pages do too.
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)
