import pytest
import torch
from softprompt_inference.model.lora.context import attach, build_tiles, detach, is_attached
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
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tiles = build_tiles([1] * num_tokens, torch.device("cuda"))
    assert tiles is not None
    assert len(tiles.tiles) == count
    assert int(tiles.tiles[:, 2].max()) <= tiles.max_tokens


def test_what_is_attached_answers_and_leaves_no_trace() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    before = linear(x)
    attach(linear, lambda out, given: out * 2 + given)
    assert is_attached(linear)
    assert torch.equal(linear(x), before * 2 + x)
    detach(linear)
    assert not is_attached(linear)
    assert torch.equal(linear(x), before)
