"""Pages of all layers in one piece of memory: each layer has its own, and one copy serves all."""

import os
from pathlib import Path

import pytest
import torch
from softprompt_inference.engine.plan import PageCopy
from softprompt_inference.model.kv_pages import KVPages

SHAPES = [(2, 8), (1, 16), (2, 8), (2, 8)]


def make_pages(device: str = "cpu") -> KVPages:
    """Pages of four layers with two shapes, every number in them different."""
    pages = KVPages(SHAPES, num_pages=5, page_size=4, dtype=torch.float32, device=torch.device(device))
    for index in range(len(SHAPES)):
        for kind, tensor in enumerate(pages.layer(index)):
            numbers = torch.arange(tensor.numel(), device=device) + (2 * index + kind) * tensor.numel()
            tensor.copy_(numbers.view(tensor.shape))
    return pages


def layers(pages: KVPages) -> list[torch.Tensor]:
    return [tensor.clone() for index in range(len(SHAPES)) for tensor in pages.layer(index)]


def test_every_layer_has_pages_of_its_own_shape_that_nobody_else_writes() -> None:
    pages = make_pages()
    for index, (num_kv_heads, head_dim) in enumerate(SHAPES):
        for kind, tensor in enumerate(pages.layer(index)):
            assert tensor.shape == (5, 4, num_kv_heads, head_dim)
            assert tensor.is_contiguous()
            assert tensor.flatten()[0] == (2 * index + kind) * tensor.numel()


def test_layers_of_one_shape_lie_in_one_tensor() -> None:
    pages = KVPages(SHAPES, num_pages=2, page_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    tensors = [tensor for index in range(len(SHAPES)) for tensor in pages.layer(index)]
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "copies", [[], [(4, 0, 3)], [(1, 2, 1), (1, 0, 3), (3, 4, 2)]], ids=["none", "one", "three from two pages"]
)
def test_a_copy_takes_the_first_rows_in_all_layers_and_nothing_else(
    copies: list[tuple[int, int, int]], device: str
) -> None:
    pages = make_pages(device)
    expected = layers(pages)
    for tensor in expected:
        before = tensor.clone()
        for source, target, count in copies:
            tensor[target, :count] = before[source, :count]
    pages.copy([PageCopy(source=source, target=target, num_positions=count) for source, target, count in copies])
    for got, wanted in zip(layers(pages), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("positions", [[0], [3, 4, 5], [19, 0, 7]])
def test_rows_are_written_in_all_layers_and_nowhere_else(positions: list[int], device: str) -> None:
    pages = KVPages([(2, 8)] * 3, num_pages=5, page_size=4, dtype=torch.float32, device=torch.device(device))
    for index in range(3):
        for tensor in pages.layer(index):
            tensor.fill_(torch.nan)
    key_values = torch.randn(3, 2, len(positions), 2, 8, device=device)
    pages.write(key_values, torch.tensor(positions, device=device))
    for index in range(3):
        for kind, tensor in enumerate(pages.layer(index)):
            rows = tensor.flatten(0, 1)
            assert torch.equal(rows[positions], key_values[index, kind])
            others = [position for position in range(20) if position not in positions]
            assert rows[others].isnan().all()


def test_pages_on_a_cpu_take_memory_when_they_are_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    pages = KVPages([(4, 64)] * 8, num_pages=8192, page_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pages.layer(7)[1].nbytes == 2**26
    assert resident_bytes() - before < 2**26
