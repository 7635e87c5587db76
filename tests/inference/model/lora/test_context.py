from itertools import chain

import pytest
import torch
from softprompt_inference.model.lora.context import (
    LoraContext,
    TileBuffers,
    attach,
    build_tiles,
    detach,
    is_attached,
)
from torch import nn

CPU = torch.device("cpu")


def test_a_step_without_a_lora_has_no_tiles() -> None:
    assert build_tiles([-1, -1, -1], CPU) is None


def test_on_a_cpu_each_lora_is_one_tile() -> None:
    tiles = build_tiles([2, -1, 0] * 100, CPU)
    assert tiles is not None
    assert tiles.tiles.tolist() == [[0, 0, 100], [2, 100, 100]]
    assert tiles.order.tolist() == [*range(2, 300, 3), *range(0, 300, 3)]
    assert tiles.order.dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "count"), [(1, 1), (256, 16), (257, 5), (4096, 64)])
def test_on_a_gpu_tiles_are_as_large_as_a_program_takes(num_tokens: int, count: int) -> None:
    tiles = build_tiles([1] * num_tokens, torch.device("cuda"))
    assert tiles is not None
    assert len(tiles.tiles) == count
    assert int(tiles.tiles[:, 2].max()) <= tiles.max_tokens


def test_kernels_for_cpus_find_the_tiles_of_a_step_that_has_some() -> None:
    context = LoraContext()
    assert context.step is None
    context.tiles = build_tiles([1, -1], CPU)
    assert context.step is not None
    context.tiles = build_tiles([-1, -1], CPU)
    assert context.step is None


def test_buffers_hold_as_many_tiles_as_any_step_needs() -> None:
    buffers = TileBuffers(40, 3, CPU)
    assert len(buffers.view(40).tiles) == 5
    assert len(buffers.view(2).tiles) == 2
    for slots in ([0] * 17 + [1] * 17 + [2] * 6, [0, 1, 2], [-1, -1, 2], [0] * 40):
        buffers.fill(slots)
        tiles = buffers.view(len(slots))
        filled = [tile for tile in tiles.tiles.tolist() if tile[2]]
        tokens = [tiles.order[first : first + count].tolist() for _, first, count in filled]
        assert sorted(chain(*tokens)) == [token for token, slot in enumerate(slots) if slot >= 0]
        assert all(slots[token] == tile[0] for tile, own in zip(filled, tokens, strict=True) for token in own)


def test_what_is_attached_answers_and_leaves_no_trace() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    before = linear(x)
    attach(linear, lambda out, given: out * 2 + given)
    assert is_attached(linear)
    assert torch.equal(linear(x), before * 2 + x)
    detach(linear)
    assert not is_attached(linear)
    assert torch.equal(linear(x), before)
