"""Norms of rows, whatever the pieces are in which their values come."""

import json

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.formats import AdapterVerifier, parse_config
from softprompt_api.formats import norms as norms_module
from softprompt_api.formats.norms import RowNorms
from softprompt_api.quality import Norms


def expected(rows: np.ndarray) -> Norms:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return Norms(low=float(norms.min()), median=float(np.median(norms)), high=float(norms.max()))


@pytest.mark.parametrize("piece", [1, 2, 5, 6, 7, 13, 42])
def test_any_pieces_give_the_norms_of_whole_rows(piece: int) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 6), dtype=np.float32)
    values, norms = rows.reshape(-1), RowNorms(*rows.shape)
    for start in range(0, len(values), piece):
        norms.add(values[start : start + piece])
    found, wanted = norms.norms(), expected(rows)
    assert (found.low, found.median, found.high) == pytest.approx((wanted.low, wanted.median, wanted.high))


def test_large_values_do_not_overflow() -> None:
    norms = RowNorms(1, 2)
    norms.add(np.array([3e38, 0], dtype=np.float32))
    assert norms.norms().high == pytest.approx(3e38)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_verified_embedding_adapter_has_the_norms_of_its_rows(dtype: type) -> None:
    rows = np.random.default_rng(1).standard_normal((5, 16)).astype(dtype)
    data = save({"prompt_embeddings": rows}, metadata={"format": "pt"})
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 16}
    verifier = AdapterVerifier(parse_config(json.dumps(config)), size_bytes=len(data), with_norms=True)
    for start in range(0, len(data), 33):
        verifier.feed(data[start : start + 33])
    found, wanted = verifier.finish().row_norms, expected(rows)
    assert found is not None
    assert (found.low, found.median, found.high) == pytest.approx((wanted.low, wanted.median, wanted.high))


def test_keys_and_values_have_no_norms_to_compare() -> None:
    rows = np.ones((5, 2 * 2 * 8), dtype=np.float32)
    data = save({"prompt_embeddings": rows}, metadata={"format": "pt"})
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 5,
        "token_dim": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    verifier = AdapterVerifier(parse_config(json.dumps(config)), size_bytes=len(data), with_norms=True)
    verifier.feed(data)
    assert verifier.finish().row_norms is None


def test_of_very_many_rows_the_first_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms_module, "_MAX_ROWS", 3)
    rows = np.random.default_rng(2).standard_normal((10, 4), dtype=np.float32)
    norms = RowNorms(*rows.shape)
    for piece in np.array_split(rows.reshape(-1), 7):
        norms.add(piece)
    assert norms.norms().high == pytest.approx(expected(rows[:3]).high)
