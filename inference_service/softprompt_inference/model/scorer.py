"""Tell how likely prompts are: log-probabilities of their own tokens, from the logits of those before them.

As in the sampler, the device is told what to do when it is made, and `result` waits.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from softprompt_inference.engine.plan import Chunk, Sampled, Scores
from softprompt_inference.model.logprobs import as_logprobs, measure
from softprompt_inference.model.sampler import NOT_FINITE, Choices
from softprompt_inference.model.transfer import Download, upload

# To measure rows takes a few copies of each, as long as the vocabulary.
_ROWS_AT_ONCE = 128


class ScoredChoices:
    """Tokens that the device is choosing, and scores that it computes beside them.

    Args:
        chunks: of the step; at least one has scores.
        choices: of those that have a sample.
        logits: [n, vocabulary], raw; for each chunk with scores, the rows that these name.
    """

    def __init__(self, chunks: Sequence[Chunk], choices: Choices, logits: Tensor) -> None:
        self._choices = choices
        self._asked = [
            (chunk.sample is not None, chunk.scores)
            for chunk in chunks
            if chunk.sample is not None or chunk.scores is not None
        ]
        scores = [each for _, each in self._asked if each is not None]
        token_ids = list(chain.from_iterable(each.token_ids for each in scores))
        given_ids = upload(token_ids, torch.int64, logits.device)
        num_top = max(each.num_top for each in scores)
        pieces = zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(given_ids, _ROWS_AT_ONCE), strict=True)
        measured = [measure(rows, ids, num_top=num_top) for rows, ids in pieces]
        self._download = Download(
            logits.amax(-1).isfinite(),
            torch.cat([each.given for each in measured]),
            torch.cat([each.values for each in measured]),
            torch.cat([each.ids for each in measured]),
        )

    @torch.inference_mode()
    def result(self) -> list[Sampled]:
        """Wait for them; one for each chunk that has a sample or scores, in order."""
        sampled = iter(self._choices.result())
        rows = zip(*self._download.lists(), strict=True)
        answers = []
        for has_sample, scores in self._asked:
            answer = next(sampled) if has_sample else Sampled(token_id=None)
            answers.append(answer if scores is None else _with_scores(answer, scores, rows))
        return answers


def _with_scores(answer: Sampled, scores: Scores, rows: Iterator[tuple[Any, ...]]) -> Sampled:
    """An answer with its scores, which are the next rows: whether they are finite, and what was measured."""
    mine = [next(rows) for _ in scores.rows]
    if not all(is_finite for is_finite, *_ in mine):
        return Sampled(token_id=answer.token_id, error=NOT_FINITE)
    told = [as_logprobs(given, values, ids, num_top=scores.num_top) for _, given, values, ids in mine]
    return Sampled(token_id=answer.token_id, logprobs=answer.logprobs, scores=told, error=answer.error)
