import random

import pytest
import torch
from softprompt_inference.engine.messages import LoadAdapter
from softprompt_inference.model.rows import KeyValueRows, VirtualRows
from softprompt_inference.model.transfer import PIECE_BYTES
from torch import Tensor

HIDDEN = 6


def adapter(rows: Tensor) -> LoadAdapter:
    return LoadAdapter(
        digest="sha256:0",
        rows=rows.view(torch.uint8).numpy().tobytes(),
        dtype=str(rows.dtype).removeprefix("torch."),
        num_virtual_tokens=rows.shape[0],
        row_size=rows.shape[1],
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows_a_piece", "num_pieces"), [(0.5, 5), (1, 5), (2, 3), (5, 1), (99, 1)])
def test_keys_and_values_are_laid_out_layer_by_layer_as_peft_reads_them_in_however_many_pieces(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows_a_piece: float, num_pieces: int
) -> None:
    values = torch.randn(5, 3 * 2 * 2 * 4).to(dtype)
    row_bytes = values[0].numel() * dtype.itemsize
    monkeypatch.setitem(PIECE_BYTES, "cpu", int(rows_a_piece * row_bytes))
    held = KeyValueRows((3, 2, 4), torch.float32, torch.device("cpu"))
    pieces = held.load(70, adapter(values))
    for _ in range(num_pieces - 1):
        next(pieces)
        with pytest.raises(KeyError):
            held.find(70)
    assert next(pieces, None) is None
    found = held.find(70)
    as_peft_does = values.float().view(5, 2 * 3, 2, 4)
    assert found.shape == (3, 2, 5, 2, 4)
    for layer in range(3):
        for kind in range(2):
            assert torch.equal(found[layer, kind], as_peft_does[:, 2 * layer + kind])
    held.drop(70)
    with pytest.raises(KeyError):
        held.find(70)
    held.drop(70)
