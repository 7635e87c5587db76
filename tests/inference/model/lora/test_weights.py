import random

import pytest
import torch
from softprompt_inference.model.lora.context import LoraContext, build_tiles, is_attached
from softprompt_inference.model.lora.linears import Linear, Product
from softprompt_inference.model.lora.weights import ProductWeights
from torch import Tensor, nn

CPU = torch.device("cpu")
SIZE, WIDTHS = 6, (5, 2, 3)
MAX_LORAS = 7


@pytest.fixture
def context() -> LoraContext:
    return LoraContext()


@pytest.fixture
def module() -> nn.Linear:
    return nn.Linear(SIZE, sum(WIDTHS), dtype=torch.float32)


@pytest.fixture
def weights(module: nn.Linear, context: LoraContext) -> ProductWeights:
    linears = tuple(
        Linear(name=str(i), in_features=SIZE, out_features=width, dtype=torch.float32)
        for i, width in enumerate(WIDTHS)
    )
    return ProductWeights(Product(module=module, linears=linears), context, MAX_LORAS, CPU)


def compute(module: nn.Module, context: LoraContext, x: Tensor, slots: list[int]) -> Tensor:
    context.tiles = build_tiles(slots, CPU)
    try:
        with torch.inference_mode():
            answer: Tensor = module(x)
            return answer
    finally:
        context.tiles = None


def test_loras_of_growing_slots_and_ranks_come_and_go(
    weights: ProductWeights, module: nn.Linear, context: LoraContext
) -> None:
    generator = random.Random(0)
    torch.manual_seed(0)
    held: dict[int, dict[int, tuple[Tensor, Tensor, float]]] = {}
    for _ in range(150):
        slot = generator.randrange(MAX_LORAS)
        if slot in held:
            weights.drop(slot)
            del held[slot]
        else:
            held[slot] = {}
            for index in generator.sample(range(3), generator.randrange(1, 4)):
                rank = generator.choice([1, 2, 8, 9, 33])
                a, b = torch.randn(rank, SIZE), torch.randn(WIDTHS[index], rank)
                held[slot][index] = (a, b, generator.choice([0.25, 1.0, 1.5]))
                weights.put(slot, index, *held[slot][index])
        slots = [generator.choice([-1, *range(MAX_LORAS)]) for _ in range(9)]
        x = torch.randn(1, 9, SIZE)
        expected = module.weight @ x[0].T + module.bias[:, None]
        for token, own in enumerate(slots):
            for index, (a, b, scale) in held.get(own, {}).items():
                start = sum(WIDTHS[:index])
                expected[start : start + len(b), token] += b @ a @ x[0, token] * scale
        torch.testing.assert_close(compute(module, context, x, slots)[0], expected.T)


def test_without_any_lora_the_module_is_as_it_was_and_no_memory_is_held(
    weights: ProductWeights, module: nn.Linear
) -> None:
    assert not is_attached(module)
    for slot in (0, 5):
        weights.put(slot, 1, torch.ones(3, SIZE), torch.ones(2, 3), 1.0)
    weights.drop(0)
    weights.drop(3)
    assert is_attached(module)
    weights.drop(5)
    assert not is_attached(module)
    assert weights.num_bytes == 0


def test_a_slot_that_is_used_again_keeps_nothing_of_the_former(
    weights: ProductWeights, module: nn.Linear, context: LoraContext
) -> None:
    x = torch.randn(1, 1, SIZE)
    a, b = torch.randn(2, SIZE), torch.randn(5, 2)
    other = (torch.randn(1, SIZE), torch.randn(3, 1), 1.0)
    weights.put(0, 0, a, b, 1.0)
    weights.put(1, 0, a, b, 1.0)
    weights.drop(0)
    weights.put(0, 2, *other)
    expected = module(x)
    expected[0, 0, 7:] += other[1] @ other[0] @ x[0, 0]
    torch.testing.assert_close(compute(module, context, x, [0]), expected)


@pytest.mark.parametrize(("widths", "unit"), [((2048, 512, 512), 512), ((96, 48), 48), ((64,), 64), (WIDTHS, 1)])
def test_kernels_are_told_what_divides_the_columns_of_every_linear(
    widths: tuple[int, ...], unit: int, context: LoraContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(SIZE, sum(widths), dtype=torch.float32)
    linears = tuple(
        Linear(name=str(i), in_features=SIZE, out_features=width, dtype=torch.float32)
        for i, width in enumerate(widths)
    )
    weights = ProductWeights(Product(module=module, linears=linears), context, MAX_LORAS, CPU)
    weights.put(0, 0, torch.ones(1, SIZE), torch.ones(widths[0], 1), 1.0)
    told = []
    monkeypatch.setattr("softprompt_inference.model.lora.weights.lora_expand", lambda *args: told.append(args[-1]))
    compute(module, context, torch.ones(1, 1, SIZE), [0])
    assert told == [unit]
