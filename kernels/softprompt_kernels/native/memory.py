"""Memory in huge pages, for weights that every step reads from end to end.

Where an ordinary page of 4 KB ends, so does what the processor reads ahead, and the next has to be looked up; in a
virtual machine, twice.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

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
        self._region: mmap.mmap | None = None
        self._taken = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of at least one value, in huge pages where the system has some."""
        count = math.prod(shape)
        size = math.ceil(count * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
        if self._region is None or self._taken + size > len(self._region):
            self._region, self._taken = _map(max(size, self._region_bytes or _REGION_BYTES)), 0
        place, self._taken = self._taken, self._taken + size
        return torch.frombuffer(self._region, dtype=dtype, count=count, offset=place).view(tuple(shape))


def _map(size: int) -> mmap.mmap:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A system without them says so; ordinary pages do too.
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return region
