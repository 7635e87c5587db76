from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from softprompt_kernels.lora_expand import lora_expand
from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.testing import AWKWARD_SIZES, DTYPES, assert_close, poisoned
from torch import Tensor

POPULARITIES = ["identical", "distinct", "uniform", "zipf", "skewed", "none"]
# Of slots 0 … 4 for three linears; the last slot of seven is not filled.
RANKS = [[1, 8, 16], [16, 0, 1], [64, 64, 64], [8, 63, 0], [0, 5, 64], [0, 0, 0], [0, 0, 0]]
NUM_FILLED, MAX_RANK = 6, 64


def inputs(
    starts: Sequence[int],
    slots: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
    *,
    num_parts: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, h, b) of sums about as large as one; whatever a rank leaves out is NaN."""
    generator = torch.Generator().manual_seed(0)
    num_slices = len(starts) - 1
    out = torch.randn(len(slots), starts[-1], generator=generator).to(dtype)
    h = poisoned(num_parts, len(order), num_slices, MAX_RANK, dtype=torch.float32)
    b = poisoned(NUM_FILLED, starts[-1], MAX_RANK, dtype=dtype)
    for part, (start, stop) in enumerate(pairwise(starts)):
        for place, token in enumerate(order):
            rank = RANKS[slots[token]][part]
            h[:, place, part, :rank] = torch.randn(num_parts, rank, generator=generator) * num_parts**-0.5
        for slot in range(NUM_FILLED):
            rank = RANKS[slot][part]
            values = torch.randn(stop - start, rank, generator=generator) * max(rank, 1) ** -0.5
            b[slot, start:stop, :rank] = values.to(dtype)
    return out, h, b


def expand(
    implementation: str, device: str, out: Tensor, h: Tensor, b: Tensor, starts: Sequence[int], tiles: LoraTiles
) -> Tensor:
    """A copy of `out` after the operation."""
    operation = lora_expand
    if implementation == "kernel":
        from softprompt_kernels.lora_expand.kernel import lora_expand as operation
    written = out.to(device).as_strided(out.shape, out.stride()) if device == "cuda" else out.clone()
    ranks = torch.tensor(RANKS, dtype=torch.int32, device=device)[:, : len(starts) - 1].contiguous()
    columns = torch.tensor(starts, dtype=torch.int32, device=device)
    operation(written, h.to(device), b.to(device), ranks, columns, tiles)
    return written.cpu()


def plain_answer(
    out: Tensor, h: Tensor, b: Tensor, starts: Sequence[int], slots: Sequence[int], order: Sequence[int]
) -> Tensor:
    """The docstring's semantics in float64, token by token."""
    expected = out.double()
    for place, token in enumerate(order):
        slot = slots[token]
        for part, (start, stop) in enumerate(pairwise(starts)):
            rank = RANKS[slot][part]
            summed = h[:, place, part, :rank].double().sum(0)
            expected[token, start:stop] += b[slot, start:stop, :rank].double() @ summed
    return expected


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 17, 65])
def test_every_token_gets_what_its_slot_adds_to_each_slice(
    implementation: str,
    popularity: str,
    num_tokens: int,
    device: str,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    starts, slots = (0, 48, 64, 73), popular_slots(popularity, num_tokens)
    tiles = make_tiles(slots, 16, device)
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, torch.float32)
    written = expand(implementation, device, out, h, b, starts, tiles)
    assert_close(written, plain_answer(out, h, b, starts, slots, order))
    others = [token for token, slot in enumerate(slots) if slot < 0]
    assert torch.equal(written[others], out[others])


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", AWKWARD_SIZES)
def test_results_of_any_size_and_dtype(
    implementation: str, dtype: torch.dtype, width: int, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    if implementation == "kernel" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    starts, slots = (0, width, width + 130), [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 64, device)
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, dtype)
    written = expand(implementation, device, out, h, b, starts, tiles)
    assert_close(written, plain_answer(out, h, b, starts, slots, order))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_float32_of_a_batch_in_16_bits(
    implementation: str, dtype: torch.dtype, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    starts, slots = (0, 20, 150), [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 16, device)
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, torch.float32)
    written = expand(implementation, device, out.to(dtype), h, b, starts, tiles)
    assert written.dtype == dtype
    assert_close(written, plain_answer(out.to(dtype), h, b, starts, slots, order))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_a_slice_whose_rank_is_zero_is_left_alone(
    implementation: str, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    starts, slots = (0, 16, 40, 50), [1, 3, 5, 4]
    tiles = make_tiles(slots, 16, device)
    out, h, b = inputs(starts, slots, tiles.order.tolist(), torch.float32)
    written = expand(implementation, device, out, h, b, starts, tiles)
    for token, (start, stop) in enumerate([(16, 40), (40, 50), (0, 50), (0, 16)]):
        assert torch.equal(written[token, start:stop], out[token, start:stop])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 256, 4096])
def test_real_sizes_on_a_gpu(
    num_tokens: int, popular_slots: Callable[[str, int], list[int]], make_tiles: Callable[..., LoraTiles]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    starts, slots = (0, 4096, 5120, 6144), popular_slots("zipf", num_tokens)
    tiles = make_tiles(slots, 64, "cuda")
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, torch.bfloat16)
    written = expand("operation", "cuda", out, h, b, starts, tiles)
    assert_close(written, plain_answer(out, h, b, starts, slots, order))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(3, 9)}, "do not fit together"),
        ({"h": torch.zeros(1, 1, 2, 4)}, "do not fit together"),
        ({"b": torch.zeros(5, 10, 4)}, "do not fit together"),
        ({"starts": torch.tensor([0, 10], dtype=torch.int32)}, "do not fit together"),
        ({"h": torch.zeros(1, 2, 2, 4).half()}, "must be float32"),
        ({"b": torch.zeros(4, 10, 4).half()}, "as out is"),
        ({"ranks": torch.zeros(4, 2, dtype=torch.int64)}, "must be int32"),
        ({"starts": torch.tensor([0, 4, 10])}, "must be int32"),
        ({"out": torch.zeros(10, 3).T}, "dense"),
        ({"b": torch.zeros(4, 4, 10).mT}, "contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: dict[str, Tensor], message: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    fitting = {
        "out": torch.zeros(3, 10),
        "h": torch.zeros(1, 2, 2, 4),
        "b": torch.zeros(4, 10, 4),
        "ranks": torch.zeros(4, 2, dtype=torch.int32),
        "starts": torch.tensor([0, 4, 10], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        lora_expand(**{**fitting, **change}, tiles=make_tiles([0, 1, -1], 16, "cpu"))
