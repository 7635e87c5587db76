import random

import pytest
import torch
from softprompt_inference.engine.messages import LoadAdapter
from softprompt_inference.model.rows import VirtualRows
from torch import Tensor

HIDDEN = 6


def adapter(rows: Tensor) -> LoadAdapter:
    return LoadAdapter(
        digest="sha256:0",
        rows=rows.view(torch.uint8).numpy().tobytes(),
        dtype=str(rows.dtype).removeprefix("torch."),
        num_virtual_tokens=rows.shape[0],
        hidden_size=rows.shape[1],
    )


@pytest.fixture
def rows() -> VirtualRows:
    return VirtualRows(HIDDEN, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_arrive_in_the_models_dtype(rows: VirtualRows, dtype: torch.dtype) -> None:
    values = torch.randn(5, HIDDEN).to(dtype)
    rows.load(100, adapter(values))
    assert torch.equal(rows.rows[rows.find([104, 100])], values[[4, 0]].float())


def test_rows_of_many_adapters_come_and_go(rows: VirtualRows) -> None:
    generator = random.Random(0)
    loaded: dict[int, Tensor] = {}
    for round_number in range(200):
        if loaded and generator.random() < 0.4:
            first_id = generator.choice(list(loaded))
            del loaded[first_id]
            rows.drop(first_id)
        else:
            first_id = 1000 + 100 * round_number
            loaded[first_id] = torch.randn(generator.randint(1, 60), HIDDEN)
            rows.load(first_id, adapter(loaded[first_id]))
        for first, values in loaded.items():
            assert torch.equal(rows.rows[rows.find(range(first, first + len(values)))], values)


def test_freed_rows_are_used_again(rows: VirtualRows) -> None:
    capacity = len(rows.rows)
    for first_id in range(0, 100 * capacity, capacity):
        rows.load(first_id, adapter(torch.randn(capacity, HIDDEN)))
        rows.drop(first_id)
    assert len(rows.rows) == capacity


def test_dropped_ids_stand_for_nothing(rows: VirtualRows) -> None:
    rows.load(50, adapter(torch.randn(2, HIDDEN)))
    rows.drop(50)
    with pytest.raises(KeyError):
        rows.find([50])
