"""Norms of the vocabulary, and the tokens that are nearest to some rows, whatever the pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_inference.engine.messages import FindNearest
from softprompt_inference.model import embeddings
from softprompt_inference.model.embeddings import NearestTokens, vocabulary_norms
from torch import nn

VOCAB_SIZE = 1000


@pytest.fixture
def embedding() -> nn.Embedding:
    torch.manual_seed(3)
    return nn.Embedding(VOCAB_SIZE, 16)


def search(embedding: nn.Module, rows: torch.Tensor, top_k: int) -> tuple[list[Any], int]:
    """The answer, and how many pieces it took."""
    found = NearestTokens(embedding, VOCAB_SIZE, rows, top_k)
    pieces = 1
    while (answer := found.advance()) is None:
        pieces += 1
    return answer, pieces


@pytest.mark.parametrize("products", [1, 2**12, 2**28])
def test_any_pieces_find_the_tokens_of_the_largest_cosine(
    embedding: nn.Embedding, monkeypatch: pytest.MonkeyPatch, products: int
) -> None:
    monkeypatch.setattr(embeddings, "_PIECE_PRODUCTS", products)
    rows = torch.randn(5, 16)
    answer, pieces = search(embedding, rows, 4)
    assert (pieces > 1) == (products < 2**28)
    cosines = torch.cosine_similarity(rows[:, None], embedding.weight[None], dim=-1).detach()
    wanted = cosines.topk(4)
    for row, own, ids, values in zip(answer, rows, wanted.indices, wanted.values, strict=True):
        assert [token_id for token_id, _ in row.tokens] == ids.tolist()
        assert [cosine for _, cosine in row.tokens] == pytest.approx(values.tolist(), abs=1e-6)
        assert row.norm == pytest.approx(float(own.norm()))


def test_a_row_that_is_a_token_is_nearest_to_it(embedding: nn.Embedding) -> None:
    answer, _ = search(embedding, 7 * embedding.weight[[5, 999]].detach(), 1)
    assert [row.tokens[0][0] for row in answer] == [5, 999]
    assert [row.tokens[0][1] for row in answer] == pytest.approx([1.0, 1.0])


def test_more_tokens_than_there_are_give_all(embedding: nn.Embedding) -> None:
    [row], _ = search(embedding, torch.randn(1, 16), VOCAB_SIZE + 5)
    assert sorted(token_id for token_id, _ in row.tokens) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("most", [100, 16_384])
def test_norms_are_those_of_the_vocabulary(
    embedding: nn.Embedding, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(embeddings, "_MAX_MEASURED", most)
    found = vocabulary_norms(embedding, VOCAB_SIZE, torch.device("cpu"))
    norms = embedding.weight.detach().norm(dim=-1)[:: -(-VOCAB_SIZE // most)]
    low, median, high = norms.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))


def test_embeddings_are_measured_as_the_first_layer_gets_them(lab: Any) -> None:
    # Gemma multiplies them by the root of the hidden size; virtual rows go in as they are.
    path = lab.model("gemma2")
    engine = lab.engine(path)
    weight = lab.oracle(path)._model(None).get_input_embeddings().weight.detach()
    median = float(weight.norm(dim=-1).median()) * 32**0.5
    assert engine.info.vocabulary_norms.median == pytest.approx(median, rel=0.02)


@pytest.mark.parametrize("kind", ["prompt_tuning", "multitask"])
def test_an_engine_finds_the_tokens_that_a_prompt_was_made_of(lab: Any, llama: Path, kind: str) -> None:
    adapter = lab.adapter(llama, kind, 5, **({"task": 1} if kind == "multitask" else {}))
    engine = lab.engine(llama)
    engine.handle(adapter.load)
    engine.handle(FindNearest(search_id=1, digest=adapter.load.digest, top_k=3))
    found = []
    while engine.has_work:
        found += engine.step().found
    rows = torch.frombuffer(bytearray(adapter.load.rows), dtype=torch.float32).view(5, -1)
    weight = lab.oracle(llama)._model(None).get_input_embeddings().weight.detach()
    wanted = torch.cosine_similarity(rows[:, None], weight[None], dim=-1).topk(3)
    [answer] = found
    assert [[token_id for token_id, _ in row.tokens] for row in answer.rows] == wanted.indices.tolist()
