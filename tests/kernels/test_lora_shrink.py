from collections.abc import Callable, Sequence

import pytest
import torch
from softprompt_kernels.lora_shrink import lora_shrink
from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.testing import AWKWARD_SIZES, DTYPES, assert_close, poisoned
from torch import Tensor

POPULARITIES = ["identical", "distinct", "uniform", "zipf", "skewed", "none"]
# Of slots 0 … 4 for two linears; the last slot of seven is not filled.
RANKS = [[1, 8], [16, 0], [64, 64], [8, 63], [0, 5], [0, 0], [0, 0]]
NUM_FILLED, NUM_SLICES, MAX_RANK = 6, 2, 64


def weights(size: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(a, scales, ranks) of sums about as large as one; whatever a rank leaves out is NaN."""
    a = poisoned(NUM_FILLED, NUM_SLICES, MAX_RANK, size, dtype=dtype)
    for slot, ranks in enumerate(RANKS[:NUM_FILLED]):
        for part, rank in enumerate(ranks):
            a[slot, part, :rank] = (torch.randn(rank, size, generator=generator) * size**-0.5).to(dtype)
    scales = torch.rand(len(RANKS), NUM_SLICES, generator=generator) + 0.5
    return a, scales, torch.tensor(RANKS, dtype=torch.int32)


def shrink(
    implementation: str, device: str, x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles
) -> Tensor:
    operation = lora_shrink
    if implementation == "kernel":
        from softprompt_kernels.lora_shrink.kernel import lora_shrink as operation
    return operation(x.to(device), a.to(device), scales.to(device), ranks.to(device), tiles).cpu()


def check(h: Tensor, x: Tensor, a: Tensor, scales: Tensor, slots: Sequence[int], order: Sequence[int]) -> None:
    """The docstring's semantics in float64, token by token."""
    assert h.dtype == torch.float32
    assert h.shape[1:] == (len(order), NUM_SLICES, MAX_RANK)
    h = h.double().sum(0).to(a.dtype)
    for place, token in enumerate(order):
        slot = slots[token]
        for part, rank in enumerate(RANKS[slot]):
            expected = (a[slot, part, :rank].double() @ x[token].double()) * scales[slot, part].double()
            assert_close(h[place, part, :rank], expected)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 17, 65])
def test_every_token_meets_the_weights_of_its_slot(
    implementation: str,
    popularity: str,
    num_tokens: int,
    device: str,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = popular_slots(popularity, num_tokens)
    x = torch.randn(num_tokens, 48, generator=generator)
    a, scales, ranks = weights(48, torch.float32, generator)
    tiles = make_tiles(slots, 16, device)
    h = shrink(implementation, device, x, a, scales, ranks, tiles)
    check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_inputs_of_any_size_and_dtype(
    implementation: str, dtype: torch.dtype, size: int, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    if implementation == "kernel" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, size, generator=generator).to(dtype)
    a, scales, ranks = weights(size, dtype, generator)
    slots = [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 64, device)
    h = shrink(implementation, device, x, a, scales, ranks, tiles)
    check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_float32_of_a_batch_in_16_bits(
    implementation: str, dtype: torch.dtype, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 40, generator=generator).to(dtype)
    a, scales, ranks = weights(40, torch.float32, generator)
    slots = [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 16, device)
    h = shrink(implementation, device, x, a, scales, ranks, tiles)
    check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_strided_tokens_are_read_rightly(
    implementation: str, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 100, generator=generator)[:, 10:42]
    a, scales, ranks = weights(32, torch.float32, generator)
    slots = [0, 2, 2, -1, 3]
    tiles = make_tiles(slots, 16, device)
    h = shrink(implementation, device, x, a, scales, ranks, tiles)
    check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.parametrize("num_parts", [1, 2, 16])
@pytest.mark.parametrize("size", [17, 200, 1100])
def test_inputs_may_be_cut_into_any_number_of_parts(
    num_parts: int, size: int, device: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    kernel = pytest.importorskip("softprompt_kernels.lora_shrink.kernel")
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(7, size, generator=generator)
    a, scales, ranks = weights(size, torch.float32, generator)
    slots = [2, 0, -1, 4, 2, 3, 1]
    tiles = make_tiles(slots, 16, device)
    tensors = (tensor.to(device) for tensor in (x, a, scales, ranks))
    h = kernel.lora_shrink(*tensors, tiles, num_parts=num_parts).cpu()
    assert len(h) == num_parts
    check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(1, 16), (256, 16), (256, 64), (4096, 64)])
def test_real_sizes_on_a_gpu(
    num_tokens: int,
    max_tokens: int,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, 4096, generator=generator).bfloat16()
    a, scales, ranks = weights(4096, torch.bfloat16, generator)
    slots = popular_slots("zipf", num_tokens)
    tiles = make_tiles(slots, max_tokens, "cuda")
    h = shrink("operation", "cuda", x, a, scales, ranks, tiles)
    check(h, x, a, scales, slots, tiles.order.tolist())
    again = shrink("operation", "cuda", x, a, scales, ranks, tiles)
    for place, token in enumerate(tiles.order.tolist()):
        for part, rank in enumerate(RANKS[slots[token]]):
            assert torch.equal(again[:, place, part, :rank], h[:, place, part, :rank])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9)}, "do not fit together"),
        ({"ranks": torch.zeros(4, 3, dtype=torch.int32)}, "do not fit together"),
        ({"scales": torch.zeros(5, 2)}, "do not fit"),
        ({"a": torch.zeros(5, 2, 4, 8)}, "5 slots do not fit"),
        ({"a": torch.zeros(4, 2, 4, 8).half()}, "must be the same or float32"),
        ({"scales": torch.zeros(4, 2).double()}, "float32 and int32"),
        ({"ranks": torch.zeros(4, 2, dtype=torch.int64)}, "float32 and int32"),
        ({"x": torch.zeros(8, 3).T}, "dense"),
        ({"a": torch.zeros(4, 2, 8, 4).mT}, "contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: dict[str, Tensor], message: str, make_tiles: Callable[..., LoraTiles]
) -> None:
    inputs = {
        "x": torch.zeros(3, 8),
        "a": torch.zeros(4, 2, 4, 8),
        "scales": torch.zeros(4, 2),
        "ranks": torch.zeros(4, 2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        lora_shrink(**{**inputs, **change}, tiles=make_tiles([0, 1, -1], 16, "cpu"))
