from collections.abc import Callable, Sequence
from dataclasses import replace
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
    implementation: str,
    device: str,
    out: Tensor,
    h: Tensor,
    b: Tensor,
    starts: Sequence[int],
    tiles: LoraTiles,
    unit: int = 1,
) -> Tensor:
    """A copy of `out` after the operation."""
    operation = lora_expand
    if implementation == "kernel":
        from softprompt_kernels.lora_expand.kernel import lora_expand as operation
    written = out.to(device).as_strided(out.shape, out.stride()) if device == "cuda" else out.clone()
    ranks = torch.tensor(RANKS, dtype=torch.int32, device=device)[:, : len(starts) - 1].contiguous()
    columns = torch.tensor(starts, dtype=torch.int32, device=device)
    operation(written, h.to(device), b.to(device), ranks, columns, tiles, unit)
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
            summed = h[:, place, part, :rank].sum(0).to(b.dtype).double()
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


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("starts", "unit"),
    [((0, 48, 64, 352), 16), ((0, 64, 128, 192), 64), ((0, 40, 80, 100), 20), ((0, 320), 320), ((0, 16, 32), 1)],
)
def test_slices_may_begin_at_multiples_of_any_unit(
    implementation: str, starts: tuple[int, ...], unit: int, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    slots = [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 16, device)
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, torch.float32)
    written = expand(implementation, device, out, h, b, starts, tiles, unit)
    assert_close(written, plain_answer(out, h, b, starts, slots, order))


@pytest.mark.parametrize("max_rank", [1, 8, 12, 24])
def test_rows_of_any_number_of_ranks_are_read_rightly(
    max_rank: int, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    kernel = pytest.importorskip("softprompt_kernels.lora_expand.kernel")
    generator = torch.Generator().manual_seed(1)
    rank = max_rank * 2 // 3 or 1
    tiles = make_tiles([0, -1, 1, 1], 16, device)
    out = torch.randn(4, 80, generator=generator)
    h, b = poisoned(2, 3, 1, max_rank, dtype=torch.float32), poisoned(2, 80, max_rank, dtype=torch.float32)
    h[0, ..., :rank], h[1, ..., :rank] = torch.randn(2, 3, 1, rank, generator=generator) * rank**-0.5
    b[..., :rank] = torch.randn(2, 80, rank, generator=generator)
    written = out.to(device, copy=True)
    ranks = torch.full((2, 1), rank, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 80], dtype=torch.int32, device=device)
    kernel.lora_expand(written, h.to(device), b.to(device), ranks, starts, tiles, 80)
    expected = out.double()
    for place, (token, slot) in enumerate([(0, 0), (2, 1), (3, 1)]):
        expected[token] += b[slot, :, :rank].double() @ h[:, place, 0, :rank].double().sum(0)
    assert_close(written.cpu(), expected)


@pytest.mark.parametrize("num_parts", [1, 8])
def test_no_more_is_read_than_shrink_has_written(
    num_parts: int, device: str, make_tiles: Callable[..., LoraTiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = pytest.importorskip("softprompt_kernels.lora_shrink.kernel")
    generator = torch.Generator().manual_seed(2)
    slots = [3, 1, -1, 5, 4, 3]
    tiles = make_tiles(slots, 16, device)
    # As the buffers of captured steps, there is room for more tokens than the step has.
    tiles = replace(tiles, order=torch.cat([tiles.order, tiles.order.new_zeros(3)]))
    starts = (0, 48, 64, 73)
    out, _, b = inputs(starts, slots, tiles.order.tolist()[:5], torch.float32)
    x, a = torch.randn(6, 150, generator=generator), torch.randn(NUM_FILLED, 3, MAX_RANK, 150, generator=generator)
    a *= 150**-0.5
    ranks, scales = torch.tensor(RANKS, dtype=torch.int32), torch.ones(len(RANKS), 3)

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return poisoned(*shape, dtype=dtype, device=str(device))

    with monkeypatch.context() as patch:
        patch.setattr(kernel.torch, "empty", empty)
        h = kernel.lora_shrink(*(each.to(device) for each in (x, a, scales, ranks)), tiles, num_parts=num_parts)
    assert h.isnan().any()
    written = expand("kernel", device, out, h, b, starts, tiles)
    summed = torch.einsum("ti,tsri->tsr", x, a[slots])[tiles.order.cpu()][None]
    assert_close(written, plain_answer(out, summed, b, starts, slots, tiles.order.tolist()[:5]))


def test_columns_of_one_program_are_planned_by_shapes_and_processors_alone() -> None:
    kernel = pytest.importorskip("softprompt_kernels.lora_expand.kernel")
    assert kernel._plan_block(48, 4096, 16, 132) == 256
    assert kernel._plan_block(48, 4096, 128, 132) == 128
    assert kernel._plan_block(48, 4096, 1024, 132) == 64
    assert kernel._plan_block(9, 4096, 16, 132) == 128
    assert kernel._plan_block(1, 4096, 16, 132) == 64


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(1, 16), (256, 16), (256, 64), (4096, 64)])
@pytest.mark.parametrize("unit", [1, 1024])
def test_real_sizes_on_a_gpu(
    num_tokens: int,
    max_tokens: int,
    unit: int,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    starts, slots = (0, 4096, 5120, 6144), popular_slots("zipf", num_tokens)
    tiles = make_tiles(slots, max_tokens, "cuda")
    order = tiles.order.tolist()
    out, h, b = inputs(starts, slots, order, torch.bfloat16)
    written = expand("operation", "cuda", out, h, b, starts, tiles, unit)
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
