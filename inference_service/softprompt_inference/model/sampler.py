"""Choose tokens from logits.

The order of operations is vLLM's: log-probabilities from the untouched logits; logit bias and banned ids;
penalties; greedy rows are done; temperature, min_p, top_k, top_p; a draw. A draw depends on its own row, seed and
index alone, and so is the same in any batch. A row with a grammar is drawn from the tokens that this allows,
whatever else is said of them.

A choice has two halves. `launch` tells the device what to do and, but for penalties, waits for nothing; the
tokens stay there, for the next step to read. `Choices.result` waits for them.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from softprompt_api.params import SamplingParams
from softprompt_kernels.sample import NO_TOKEN
from softprompt_kernels.sample import sample as draw
from torch import Tensor

from softprompt_inference.engine.messages import Logprobs
from softprompt_inference.engine.plan import Sample, Sampled
from softprompt_inference.engine.seen import Seen
from softprompt_inference.model.logprobs import as_logprobs, measure
from softprompt_inference.model.transfer import Download, upload, upload_bytes

NOT_FINITE = "the model's logits are not finite"
# Below this, dividing by the temperature would overflow: the row is greedy.
_LEAST_TEMPERATURE = 1e-5
# Below this, dividing by the repetition penalty would overflow; it draws to what was seen all the same.
_LEAST_PENALTY = 1e-5


def sample(logits: Tensor, samples: Sequence[Sample]) -> list[Sampled]:
    """One choice per row.

    logits  [n, vocabulary]  raw
    samples n                a row that is not finite gets an error; the others are not affected
    """
    return launch(logits, samples).result()


def launch(logits: Tensor, samples: Sequence[Sample]) -> "Choices":
    """The first half of `sample`; what the device is told to do next may write to the logits' memory."""
    edited, allowed = logits, _allowed(samples, logits)
    if any(_is_edited(s) for s in samples):
        edited = logits.to(torch.float32, copy=True)
        for row, s in zip(edited, samples, strict=True):
            _edit(row, s)
    tokens = _choose(edited, samples, allowed)
    if edited is not logits or allowed is not None:
        # A ban may hide what is not finite.
        tokens = torch.where(logits.amax(-1).isfinite(), tokens, NO_TOKEN)
    return Choices(samples, tokens, _logprobs(logits, tokens, samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Log-probabilities of the rows that ask.

    rows    n                of the batch
    chosen  [n]
    values, ids  [n, most alternatives]
    full_rows  m             those of them that ask for all
    every   [m, vocabulary]
    """

    rows: list[int]
    chosen: Tensor
    values: Tensor
    ids: Tensor
    full_rows: list[int]
    every: Tensor | None


class Choices:
    """Tokens that the device is choosing.

    Attributes:
        tokens: [n] int64, on the device; below zero where there is none.
    """

    def __init__(self, samples: Sequence[Sample], tokens: Tensor, wanted: _Wanted | None) -> None:
        self.tokens = tokens
        self._params = [s.params for s in samples]  # the samples change with their sequences
        self._wanted = wanted
        tensors = [tokens] if wanted is None else [tokens, wanted.chosen, wanted.values, wanted.ids]
        self._download = Download(*tensors) if samples else None
        every = None if wanted is None else wanted.every
        self._every = None if every is None else Download(every)

    @torch.inference_mode()
    def result(self) -> list[Sampled]:
        """Wait for the tokens; one for each sample, in order."""
        if self._download is None:
            return []
        token_ids, *lists = self._download.lists()
        logprobs = self._read_logprobs(lists)
        return [
            Sampled(0, error=NOT_FINITE) if token_id == NO_TOKEN else Sampled(token_id, logprobs.get(i))
            for i, token_id in enumerate(token_ids)
        ]

    def _read_logprobs(self, lists: list[list[Any]]) -> dict[int, Logprobs]:
        """By row, for the rows that ask."""
        if self._wanted is None:
            return {}
        rows_bytes = self._every.rows_bytes() if self._every else []
        every = dict(zip(self._wanted.full_rows, rows_bytes, strict=True))
        found = {}
        for i, chosen, values, ids in zip(self._wanted.rows, *lists, strict=True):
            num_top = self._params[i].logprobs or 0
            found[i] = as_logprobs(chosen, values, ids, num_top=num_top, every=every.get(i, b""))
        return found


def _is_edited(s: Sample) -> bool:
    return _is_banned(s) or bool(s.params.logit_bias) or s.seen is not None


def _is_banned(s: Sample) -> bool:
    return bool(s.banned_ids) and s.matcher is None  # which leaves banned ids out by itself


def _edit(row: Tensor, s: Sample) -> None:
    """Bias, ban and penalise, in place. row [vocabulary]"""
    p = s.params
    if p.logit_bias:
        row[_ids(p.logit_bias.keys(), row)] += upload(list(p.logit_bias.values()), torch.float32, row.device)
    if _is_banned(s):
        row.index_fill_(0, _ids(s.banned_ids, row), -math.inf)
    if s.seen is not None:
        _penalise(row, p, s.seen)


def _penalise(row: Tensor, p: SamplingParams, seen: Seen) -> None:
    """By what was seen, in place. row [vocabulary]"""
    ids, counts = (upload(values, torch.int64, row.device) for values in (seen.token_ids, seen.counts))
    logits = row[ids]
    if p.repetition_penalty != 1.0:
        penalty = max(p.repetition_penalty, _LEAST_PENALTY)
        logits = torch.where(logits > 0, logits / penalty, logits * penalty)
    row[ids] = logits - (p.frequency_penalty * counts + p.presence_penalty * (counts > 0))


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return upload(list(ids), torch.int64, like.device)


def _select(rows: Tensor, indices: list[int]) -> Tensor:
    """Those rows, in rising order: the tensor itself where they are all."""
    return rows if len(indices) == len(rows) else rows[_ids(indices, rows)]


def _allowed(samples: Sequence[Sample], logits: Tensor) -> Tensor | None:
    """[n, ceil(V / 32)] int32, one bit for each token; None where nobody has a grammar."""
    if all(s.matcher is None for s in samples):
        return None
    shape = (len(samples), -(-logits.shape[1] // 32))
    every_token = b"\xff" * (4 * shape[1])
    # The device computes the logits meanwhile.
    masks = [every_token if s.matcher is None else s.matcher.allowed(s.banned_ids) for s in samples]
    return upload_bytes(b"".join(masks), shape, torch.int32, logits.device)


def _choose(logits: Tensor, samples: Sequence[Sample], allowed: Tensor | None) -> Tensor:
    """[n] int64"""
    params = [s.params for s in samples]
    drawn = [p.temperature >= _LEAST_TEMPERATURE for p in params]
    if not any(drawn):
        # Nothing else is read of greedy rows, so there is nothing to bring to the device.
        zeros = torch.zeros(len(samples), dtype=torch.float64, device=logits.device)
        return draw(
            logits,
            temperature=zeros,
            top_k=zeros.long(),
            top_p=torch.ones_like(zeros),
            min_p=zeros,
            points=zeros,
            allowed=allowed,
        )
    temperature, top_p, min_p, points = upload(
        [
            [p.temperature * is_drawn for p, is_drawn in zip(params, drawn, strict=True)],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [uniform(s.seed, s.index) if is_drawn else 0.0 for s, is_drawn in zip(samples, drawn, strict=True)],
        ],
        torch.float64,
        logits.device,
    )
    top_k = upload([p.top_k for p in params], torch.int64, logits.device)
    return draw(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, points=points, allowed=allowed
    )


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 48 random bits, the same for the same seed and index everywhere."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def _logprobs(raw: Tensor, tokens: Tensor, samples: Sequence[Sample]) -> _Wanted | None:
    counts = {i: s.params.logprobs for i, s in enumerate(samples) if s.params.logprobs is not None}
    if not counts:
        return None
    rows = list(counts)
    measured = measure(_select(raw, rows), _select(tokens, rows), num_top=max(counts.values()))
    full_rows = [i for i in rows if samples[i].all_logprobs]
    every = None
    if full_rows:
        every = _select(raw, full_rows).float() - _select(measured.total, [rows.index(i) for i in full_rows])
    return _Wanted(
        rows=rows,
        chosen=measured.given,
        values=measured.values,
        ids=measured.ids,
        full_rows=full_rows,
        every=every,
    )
