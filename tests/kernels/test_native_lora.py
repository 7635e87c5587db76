from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from softprompt_kernels import native
from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.native.lora import LoraStep, PackedLoras
from softprompt_kernels.native.memory import PooledPages, RegionPool
from softprompt_kernels.testing import assert_close
from torch import Tensor

NUM_SLOTS = 5
# Of each slot and slice; the third slice has more than a panel of ranks.
RANKS = [(8, 3, 16), (1, 0, 40), (16, 16, 16), (0, 5, 64), (17, 32, 0)]
POPULARITIES = ["identical", "distinct", "uniform", "zipf", "skewed", "none"]

Tiles = Callable[[Sequence[int]], LoraTiles]


@pytest.fixture
def tiles(make_tiles: Callable[..., LoraTiles]) -> Tiles:
    return lambda slots: make_tiles(slots, max(len(slots), 1), "cpu")


def random(*shape: int, dtype: torch.dtype, size: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


class Product:
    """Linears side by side, or a gate and what it gates, with LoRAs of random weights."""

    def __init__(self, widths: Sequence[int], size: int, dtype: torch.dtype, *, gated: bool = False) -> None:
        self.widths, self.size, self.dtype, self.gated = widths, size, dtype, gated
        # In either dtype, weights of products are kept in bfloat16.
        self.weights = [
            random(width, size, dtype=torch.bfloat16, size=size**-0.5, seed=i).to(dtype)
            for i, width in enumerate(widths)
        ]
        self.packed = native.pack_gated(*self.weights) if gated else native.pack_linear(torch.cat(self.weights))
        self.loras = PackedLoras(dtype)
        pool = RegionPool(2**16)
        self.memory = [PooledPages(pool) for _ in range(NUM_SLOTS)]
        self.loras.prepare(widths, gated=gated, num_slots=NUM_SLOTS, memory=self.memory)
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}

    def put(self, slot: int, index: int, rank: int) -> None:
        seed = 100 + 10 * slot + index
        a = random(rank, self.size, dtype=self.dtype, size=self.size**-0.5, seed=seed)
        b = random(self.widths[index], rank, dtype=self.dtype, size=rank**-0.5, seed=seed + 1000)
        scale = (0.5, 1.0, 0.3)[(slot + index) % 3]
        self.held[slot, index] = a, b, scale
        self.loras.put(slot, index, a, b, scale)

    def drop(self, slot: int) -> None:
        self.loras.drop(slot)
        self.memory[slot].free()
        self.held = {key: held for key, held in self.held.items() if key[0] != slot}

    def fill(self) -> "Product":
        for slot, ranks in enumerate(RANKS):
            for index in range(len(self.widths)):
                if ranks[index]:
                    self.put(slot, index, ranks[index])
        return self

    def compute(self, x: Tensor, tiles: LoraTiles | None, activation: str = "identity") -> Tensor:
        return native.linear(
            x,
            self.packed,
            None,
            columns=self.widths[0] if self.gated else sum(self.widths),
            activation=activation,
            gated=self.gated,
            loras=self.loras,
            step=None if tiles is None else LoraStep(tiles),
        )

    def plain_answers(self, x: Tensor, slots: Sequence[int]) -> list[Tensor]:
        """Each linear in float64, token by token."""
        answers = [x.double() @ weight.double().T for weight in self.weights]
        for token, slot in enumerate(slots):
            for index, answer in enumerate(answers):
                if (slot, index) in self.held:
                    a, b, scale = self.held[slot, index]
                    answer[token] += b.double() @ (a.double() @ x[token].double()) * scale
        return answers


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 17, 65])
def test_every_token_gets_what_its_lora_adds_to_each_linear(
    dtype: torch.dtype,
    popularity: str,
    num_tokens: int,
    popular_slots: Callable[[str, int], list[int]],
    tiles: Tiles,
) -> None:
    product, slots = Product((48, 16, 32), 64, dtype).fill(), popular_slots(popularity, num_tokens)
    x = random(num_tokens, 64, dtype=dtype, seed=5)
    out = product.compute(x, tiles(slots))
    assert_close(out, torch.cat(product.plain_answers(x, slots), 1))
    plain, others = product.compute(x, None), [token for token, slot in enumerate(slots) if slot < 0]
    assert torch.equal(out[others], plain[others])


@pytest.mark.parametrize("widths", [(1,), (16,), (40,), (32, 16, 23), (16, 48), (112, 16, 16)])
@pytest.mark.parametrize("size", [2, 30, 32, 62, 96, 576])
def test_products_of_any_shape(dtype: torch.dtype, widths: tuple[int, ...], size: int, tiles: Tiles) -> None:
    slots = [2, 0, 0, -1, 4, 2, 3, 1, 1, 1]
    product, x = Product(widths, size, dtype).fill(), random(len(slots), size, dtype=dtype, seed=6)
    assert_close(product.compute(x, tiles(slots)), torch.cat(product.plain_answers(x, slots), 1))


@pytest.mark.parametrize("width", [16, 41, 96])
@pytest.mark.parametrize("num_tokens", [1, 13, 40])
def test_a_gate_and_what_it_gates_are_changed_before_they_meet(
    dtype: torch.dtype, width: int, num_tokens: int, tiles: Tiles
) -> None:
    slots = [(token % 6) - 1 for token in range(num_tokens)]
    product, x = Product((width, width), 64, dtype, gated=True).fill(), random(num_tokens, 64, dtype=dtype, seed=7)
    gate, up = product.plain_answers(x, slots)
    assert_close(product.compute(x, tiles(slots), "silu"), F.silu(gate) * up)


@pytest.mark.parametrize("size", [62, 576])
def test_a_token_has_the_same_answer_in_any_batch(dtype: torch.dtype, size: int, tiles: Tiles) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, NUM_SLOTS, (70,), generator=generator).tolist()
    slots[20:60] = [2] * 40
    product, x = Product((48, 16, 32), size, dtype).fill(), random(70, size, dtype=dtype, seed=8)
    together = product.compute(x, tiles(slots))
    for start, stop in ((0, 70), (3, 4), (10, 27), (20, 60), (33, 70)):
        alone = product.compute(x[start:stop], tiles(slots[start:stop]))
        assert torch.equal(alone, together[start:stop])
    order = torch.randperm(70, generator=generator)
    shuffled = product.compute(x[order], tiles([slots[i] for i in order.tolist()]))
    assert torch.equal(shuffled, together[order])


def test_several_threads_answer_as_one(dtype: torch.dtype, tiles: Tiles) -> None:
    slots = [(token % 6) - 1 for token in range(64)]
    product, x = Product((48, 16, 32), 576, dtype).fill(), random(64, 576, dtype=dtype, seed=9)
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            answers.append(product.compute(x, tiles(slots)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*answers)


def test_a_slot_that_is_filled_anew_keeps_nothing_of_the_former(dtype: torch.dtype, tiles: Tiles) -> None:
    product, x = Product((32, 16), 64, dtype), random(3, 64, dtype=dtype, seed=10)
    slots = [1, 0, 1]
    plain = product.compute(x, None)
    assert torch.equal(product.compute(x, tiles(slots)), plain)
    for ranks in ((40, 3), (2, 0), (0, 17), (8, 8)):
        for index, rank in enumerate(ranks):
            if rank:
                product.put(1, index, rank)
        out = product.compute(x, tiles(slots))
        assert_close(out, torch.cat(product.plain_answers(x, slots), 1))
        assert torch.equal(out[1], plain[1])
        product.drop(1)
        assert product.loras.num_bytes == 0
        assert torch.equal(product.compute(x, tiles(slots)), plain)


def test_weights_take_the_memory_of_their_own_ranks(dtype: torch.dtype) -> None:
    product = Product((32, 16), 64, dtype)
    product.put(0, 0, 16)
    num_values = 16 * (64 + 32)
    assert product.loras.num_bytes == num_values * dtype.itemsize
    product.put(3, 1, 1)
    # Of b, pairs of ranks lie together in bfloat16.
    num_values += 16 * 64 + 16 * (2 if dtype == torch.bfloat16 else 1)
    assert product.loras.num_bytes == num_values * dtype.itemsize


def test_linears_that_begin_within_a_panel_are_known() -> None:
    assert PackedLoras.can_hold([41])
    assert PackedLoras.can_hold([32, 16, 7])
    assert not PackedLoras.can_hold([8, 16])


def test_panels_are_counted_as_the_products_lay_them_out(dtype: torch.dtype) -> None:
    """What the kernel takes for a linear's columns are that linear's."""
    for widths, gated in (((48, 16, 23), False), ((41, 41), True)):
        product = Product(widths, 32, dtype, gated=gated)
        starts = [0, *accumulate(widths)]
        for index, (start, stop) in enumerate(pairwise(starts)):
            product.put(0, index, 4)
            step = LoraStep(
                LoraTiles(order=torch.tensor([0]), tiles=torch.tensor([[0, 0, 1]]).int(), max_tokens=1)
            )
            x = random(1, 32, dtype=dtype, seed=11)
            columns = 16 * len(product.packed)
            changed, plain = (
                native.linear(x, product.packed, None, columns=columns, loras=product.loras, step=each)
                for each in (step, None)
            )
            if gated:
                wanted = (changed != plain).view(-1, 2, 16)
                assert not wanted[:, 1 - index].any()
                assert wanted[:, index].flatten()[: widths[index]].float().mean() > 0.9
            else:
                wanted = (changed != plain)[0]
                assert not wanted[:start].any()
                assert not wanted[stop:].any()
                assert wanted[start:stop].float().mean() > 0.9
            product.drop(0)
