import gc
import mmap
import weakref
from typing import Any

import pytest
import torch
from softprompt_kernels.native import memory
from softprompt_kernels.native.memory import HugePages


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


def test_small_regions_may_be_asked_for() -> None:
    pages = HugePages(4096)
    first = pages.empty((3000,), torch.uint8)
    second = pages.empty((1000,), torch.uint8)
    third = pages.empty((1000,), torch.uint8)
    assert second.data_ptr() == first.data_ptr() + 3008
    assert abs(third.data_ptr() - first.data_ptr()) >= 4096


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
