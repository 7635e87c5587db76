"""The embeddings of the vocabulary: how long they are, and which of them are nearest to an adapter's rows."""

import torch
from softprompt_api.quality import Norms
from torch import Tensor, nn
from torch.nn.functional import normalize

from softprompt_inference.engine.messages import NearRow

# So many tokens, spread over the vocabulary, tell its norms well enough.
_MAX_MEASURED = 16_384
# Multiplications of one piece of a search: some milliseconds on a CPU.
_PIECE_PRODUCTS = 2**28


@torch.inference_mode()
def vocabulary_norms(embedding: nn.Module, vocab_size: int, device: torch.device) -> Norms:
    """1st percentile, median and 99th of the norms of token embeddings, as the first layer gets them."""
    step = -(-vocab_size // _MAX_MEASURED)
    token_ids = torch.arange(0, vocab_size, step, device=device)
    norms = embedding(token_ids).float().norm(dim=-1)
    low, median, high = norms.quantile(torch.tensor([0.01, 0.5, 0.99], device=device)).tolist()
    return Norms(low=low, median=median, high=high)


class NearestTokens:
    """A search for the tokens whose embeddings have the largest cosine with each of some rows.

    Args:
        embedding: the model's own.
        vocab_size: ids lie below it.
        rows: [n, hidden], not changed later.
        top_k: tokens for each row; fewer where the vocabulary has fewer.
    """

    def __init__(self, embedding: nn.Module, vocab_size: int, rows: Tensor, top_k: int) -> None:
        self._embedding = embedding
        self._vocab_size = vocab_size
        self._norms = rows.float().norm(dim=-1)
        self._directions = normalize(rows.float(), dim=-1)
        self._top_k = top_k
        self._piece = max(64, _PIECE_PRODUCTS // rows.numel())
        self._next_id = 0
        self._cosines = rows.new_empty(len(rows), 0, dtype=torch.float32)
        self._ids = rows.new_empty(len(rows), 0, dtype=torch.int64)

    @torch.inference_mode()
    def advance(self) -> list[NearRow] | None:
        """Look at the next tokens; the answer once there are no more, and None before."""
        start, stop = self._next_id, min(self._next_id + self._piece, self._vocab_size)
        token_ids = torch.arange(start, stop, device=self._ids.device)
        tokens = normalize(self._embedding(token_ids).float(), dim=-1)
        cosines = torch.cat([self._cosines, self._directions @ tokens.T], dim=1)
        ids = torch.cat([self._ids, token_ids.expand(len(self._ids), -1)], dim=1)
        self._cosines, places = cosines.topk(min(self._top_k, cosines.shape[1]), dim=1)
        self._ids = ids.gather(1, places)
        self._next_id = stop
        return self._answer() if stop == self._vocab_size else None

    def _answer(self) -> list[NearRow]:
        return [
            NearRow(norm=norm, tokens=list(zip(ids, cosines, strict=True)))
            for norm, ids, cosines in zip(
                self._norms.tolist(), self._ids.tolist(), self._cosines.tolist(), strict=True
            )
        ]
