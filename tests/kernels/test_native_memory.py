import gc
import mmap
import weakref
from typing import Any

import pytest
import torch
from softprompt_kernels.native import memory
from softprompt_kernels.native.memory import HugePages, PooledPages, RegionPool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_tensors_are_contiguous_and_keep_what_is_written_to_them(dtype: torch.dtype) -> None:
    pages = HugePages()
    originals = [torch.arange(6 * n).view(2, 3, n).to(dtype) for n in (1, 7, 64)]
    copies = [pages.empty(original.shape, dtype).copy_(original) for original in originals]
    for original, copy in zip(originals, copies, strict=True):
        assert copy.is_contiguous()
        assert torch.equal(copy, original)
        assert copy.data_ptr() % 64 == 0
    copies[0].zero_()
    assert torch.equal(copies[1], originals[1])


def test_what_is_larger_than_a_region_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_REGION_BYTES", 4096)
    pages = HugePages()
    sizes = (100, 5000, 4000, 64)
    copies = [pages.empty((size,), torch.uint8).fill_(size % 251) for size in sizes]
    for size, copy in zip(sizes, copies, strict=True):
        assert torch.equal(copy, torch.full((size,), size % 251, dtype=torch.uint8))


def test_regions_of_a_pool_are_used_again_once_they_are_free() -> None:
    pool = RegionPool(4096)
    first, second = PooledPages(pool), PooledPages(pool)
    places = {first.empty((3000,), torch.uint8).fill_(7).data_ptr() for _ in range(3)}  # nobody has the tensors
    assert len(places) == 3
    assert second.empty((3000,), torch.uint8).data_ptr() not in places
    first.free()
    assert {second.empty((3000,), torch.uint8).data_ptr() for _ in range(3)} == places
    assert first.empty((3000,), torch.uint8).data_ptr() not in places


def test_what_is_larger_than_the_regions_of_a_pool_is_not_kept() -> None:
    pool = RegionPool(4096)
    pages = PooledPages(pool)
    large = pages.empty((5000,), torch.uint8).fill_(1)
    pages.free()
    assert torch.equal(large, torch.ones(5000, dtype=torch.uint8))  # whoever has it keeps it
    assert pool.take(100) is not pool.take(100)
    assert len(pool.take(5000)) == 5000


def test_a_region_goes_with_the_last_tensor_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    regions: list[weakref.ref[mmap.mmap]] = []
    make = mmap.mmap

    def noted(*args: Any, **kwargs: Any) -> mmap.mmap:
        region = make(*args, **kwargs)
        regions.append(weakref.ref(region))
        return region

    monkeypatch.setattr(mmap, "mmap", noted)
    monkeypatch.setattr(memory, "_REGION_BYTES", 4096)
    pages = HugePages()
    kept = pages.empty((700,), torch.float32).fill_(1)
    pages.empty((700,), torch.float32)
    first, _ = regions
    gc.collect()
    assert first() is not None
    assert torch.equal(kept, torch.ones(700))
    del kept
    gc.collect()
    assert first() is None
