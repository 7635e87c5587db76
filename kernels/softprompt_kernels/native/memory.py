"""Memory for weights: in huge pages for those that every step reads from end to end, or used again and again.

Where an ordinary page of 4 KB ends, so does what the processor reads ahead, and the next has to be looked up; in a
virtual machine, twice.
"""

import contextlib
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

_REGION_BYTES = 64 * 2**20
_ALIGNMENT = 64


class Regions(ABC):
    """Gives out parts of large regions. A region is given back when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._region: mmap.mmap | None = None
        self._taken = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of at least one value."""
        count = math.prod(shape)
        size = math.ceil(count * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
        if self._region is None or self._taken + size > len(self._region):
            self._region, self._taken = self._next_region(size), 0
        place, self._taken = self._taken, self._taken + size
        return torch.frombuffer(self._region, dtype=dtype, count=count, offset=place).view(tuple(shape))

    @abstractmethod
    def _next_region(self, size: int) -> mmap.mmap:
        """Where the next of so many bytes goes."""


class HugePages(Regions):
    """In huge pages where the system has some."""

    def _next_region(self, size: int) -> mmap.mmap:
        region = _map(max(size, _REGION_BYTES))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A system without them says so; ordinary pages do too.
            with contextlib.suppress(OSError):
                region.madvise(mmap.MADV_HUGEPAGE)
        return region


class RegionPool:
    """Regions that are used again and again, for what is loaded beside steps.

    The system clears a page before it gives it out, and the host of a virtual machine may first have to find it.
    That takes 5 ms at once where it is a huge one, and 10 µs for each of the 512 ordinary ones in its place.

    Args:
        region_bytes: of those that are kept.
    """

    def __init__(self, region_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._free: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        """One of at least so many bytes, with whatever was written into it."""
        if size > self._region_bytes:
            return _map(size)
        return self._free.pop() if self._free else _map(self._region_bytes)

    def give_back(self, region: mmap.mmap) -> None:
        """Nobody uses it any more."""
        if len(region) == self._region_bytes:
            self._free.append(region)


class PooledPages(Regions):
    """Gives out parts of a pool's regions. All that it gave out stays until `free`, whoever has the tensors."""

    def __init__(self, pool: RegionPool) -> None:
        super().__init__()
        self._pool = pool
        self._regions: list[mmap.mmap] = []

    def free(self) -> None:
        """Nothing that was given out is used any more."""
        self._region = None
        while self._regions:
            self._pool.give_back(self._regions.pop())

    def _next_region(self, size: int) -> mmap.mmap:
        self._regions.append(self._pool.take(size))
        return self._regions[-1]


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
