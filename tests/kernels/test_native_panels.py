"""Matrices in panels: every value is where the products look for it, and nothing else is."""

import pytest
import torch
from softprompt_kernels import native
from softprompt_kernels.native.memory import PooledPages, RegionPool
from softprompt_kernels.native.panels import PANEL, pack_panels
from torch import Tensor


def matrix(columns: int, size: int, dtype: torch.dtype) -> Tensor:
    """Values that differ from their neighbours', none of them 0."""
    return (1 + torch.arange(columns * size) % 251).view(columns, size).to(dtype)


def pages() -> PooledPages:
    """Memory that is not zero."""
    pool = RegionPool(2**21)
    region = pool.take(2**21)
    region[:] = b"\xff" * 2**21
    pool.give_back(region)
    return PooledPages(pool)


@pytest.mark.parametrize(("dtype", "beside"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("columns", [1, 16, 17, 40])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("together", [1, 2])
def test_columns_lie_in_panels(
    native_kernels: None, dtype: torch.dtype, beside: int, columns: int, size: int, together: int
) -> None:
    values = matrix(columns, size, dtype)
    packed = pack_panels(native.loaded(), [values], pages(), beside=beside, together=together)
    assert packed.shape[2:] == (PANEL, beside)
    assert len(packed) % together == 0
    # Back to columns, and what fills them up.
    unpacked = packed.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    assert torch.equal(unpacked[:columns, :size], values)
    assert not unpacked[columns:].any()
    assert not unpacked[:, size:].any()


def test_panels_of_several_matrices_take_turns(native_kernels: None) -> None:
    matrices = [matrix(40, 6, torch.bfloat16), -matrix(40, 6, torch.bfloat16)]
    packed = pack_panels(native.loaded(), matrices, pages(), beside=2)
    for index, values in enumerate(matrices):
        alone = pack_panels(native.loaded(), [values], pages(), beside=2)
        assert torch.equal(packed[index::2], alone)


def test_a_matrix_that_does_not_lie_in_order(native_kernels: None) -> None:
    values = matrix(48, 32, torch.float32)
    for view in (values.T, values[:, 3:9], values[::2]):
        packed = pack_panels(native.loaded(), [view], pages(), beside=1)
        assert torch.equal(packed, pack_panels(native.loaded(), [view.clone()], pages(), beside=1))


def test_several_threads_lay_out_as_one(native_kernels: None) -> None:
    values, threads, packed = matrix(1000, 576, torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            packed.append(pack_panels(native.loaded(), [values], pages(), beside=2, together=2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*packed)
