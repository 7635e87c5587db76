"""Choose tokens from logits.

The order of operations is vLLM's: log-probabilities from the untouched logits; logit bias and banned ids;
penalties; greedy rows are done; temperature, min_p, top_k, top_p; a draw. A draw depends on its own row, seed and
index alone, and so is the same in any batch.

A choice has two halves. `launch` tells the device what to do and, but for penalties, waits for nothing; the
tokens stay there, for the next step to read. `Choices.result` waits for them. Where a row's candidates do not hold
the mass that top_p asks for, it looks further, and what was computed from the row's token on the device is void.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from softprompt_api.params import SamplingParams
from torch import Tensor

from softprompt_inference.engine.messages import Logprobs
from softprompt_inference.engine.plan import Sample, Sampled, looks_back
from softprompt_inference.model.transfer import Download, upload

NOT_FINITE = "the model's logits are not finite"
# In place of tokens, on the device.
_NO_TOKEN, _LOOK_FURTHER = -1, -2
# Below this, dividing by the temperature would overflow: the row is greedy.
_LEAST_TEMPERATURE = 1e-5
# So many of the likeliest tokens nearly always hold the mass that top_p asks for; sorting a whole vocabulary costs
# many times more.
_CANDIDATES = 1024


def sample(logits: Tensor, samples: Sequence[Sample]) -> list[Sampled]:
    """One choice per row.

    logits  [n, vocabulary]  raw
    samples n                a row that is not finite gets an error; the others are not affected
    """
    return launch(logits, samples).result()


def launch(logits: Tensor, samples: Sequence[Sample]) -> "Choices":
    """The first half of `sample`; what the device is told to do next may write to the logits' memory."""
    raw = logits.float()
    top, tokens = raw.max(-1)  # a NaN or +inf anywhere in a row shows in its maximum
    edited = raw
    if any(_is_edited(s) for s in samples):
        edited = raw.clone()
        for row, s in zip(edited, samples, strict=True):
            _edit(row, s)
        tokens = edited.argmax(-1)
    drawn = [i for i, s in enumerate(samples) if s.params.temperature >= _LEAST_TEMPERATURE]
    cut = None
    if drawn:
        own_tokens, cut = _draw(_select(edited, drawn), [samples[i] for i in drawn], drawn)
        tokens = own_tokens if len(drawn) == len(samples) else tokens.index_copy(0, _ids(drawn, raw), own_tokens)
    tokens = torch.where(torch.isfinite(top), tokens, _NO_TOKEN)
    return Choices(samples, tokens, cut, _logprobs(raw, tokens, samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """What is drawn by top_k or top_p, before either.

    rows    n                of the batch
    scaled  [n, vocabulary]
    """

    rows: list[int]
    scaled: Tensor
    samples: list[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Log-probabilities of the rows that ask.

    rows      n                of the batch
    logprobs  [n, vocabulary]
    chosen    [n]
    values, ids  [n, most alternatives]
    """

    rows: list[int]
    logprobs: Tensor
    chosen: Tensor
    values: Tensor
    ids: Tensor


class Choices:
    """Tokens that the device is choosing.

    Attributes:
        tokens: [n] int64, on the device; below zero where there is none, for good or until the host has looked.
    """

    def __init__(
        self, samples: Sequence[Sample], tokens: Tensor, cut: _Cut | None, wanted: _Wanted | None
    ) -> None:
        self.tokens = tokens
        self._params = [s.params for s in samples]  # the samples' ids change with their sequences
        self._cut = cut
        self._wanted = wanted
        tensors = [tokens] if wanted is None else [tokens, wanted.chosen, wanted.values, wanted.ids]
        self._download = Download(*tensors) if samples else None

    @torch.inference_mode()
    def result(self) -> list[Sampled]:
        """Wait for the tokens; one for each sample, in order."""
        if self._download is None:
            return []
        token_ids, *lists = self._download.lists()
        revised = self._look_further(token_ids)
        logprobs = self._read_logprobs(token_ids, revised, lists)
        return [
            Sampled(token_id=0, error=NOT_FINITE)
            if token_id == _NO_TOKEN
            else Sampled(token_id=token_id, logprobs=logprobs.get(i), revised=i in revised)
            for i, token_id in enumerate(token_ids)
        ]

    def _look_further(self, token_ids: list[int]) -> set[int]:
        """Fill in the tokens that are still to be drawn; their rows."""
        cut = self._cut
        short = [j for j, i in enumerate(cut.rows) if token_ids[i] == _LOOK_FURTHER] if cut else []
        if cut is None or not short:
            return set()
        samples = [cut.samples[j] for j in short]
        kept = _keep_top(_select(cut.scaled, short), [s.params for s in samples], _CANDIDATES)
        rows = [cut.rows[j] for j in short]
        for i, token_id in zip(rows, _pick(kept, samples).tolist(), strict=True):
            token_ids[i] = token_id
        return set(rows)

    def _read_logprobs(
        self, token_ids: list[int], revised: set[int], lists: list[list[Any]]
    ) -> dict[int, Logprobs]:
        """By row, for the rows that ask."""
        if self._wanted is None:
            return {}
        found = {}
        for j, (i, chosen, values, ids) in enumerate(zip(self._wanted.rows, *lists, strict=True)):
            own = self._wanted.logprobs[j, token_ids[i]].item() if i in revised else chosen
            count = self._params[i].logprobs
            found[i] = Logprobs(chosen=own, top=list(zip(ids[:count], values[:count], strict=True)))
        return found


def _is_edited(s: Sample) -> bool:
    return bool(s.banned_ids or s.params.logit_bias) or looks_back(s.params)


def _edit(row: Tensor, s: Sample) -> None:
    """Bias, ban and penalise, in place. row [vocabulary]"""
    p = s.params
    if p.logit_bias:
        row[_ids(p.logit_bias.keys(), row)] += upload(list(p.logit_bias.values()), torch.float32, row.device)
    if s.banned_ids:
        row.index_fill_(0, _ids(s.banned_ids, row), -math.inf)
    if p.repetition_penalty != 1.0:
        seen = _ids({*s.prompt_ids, *s.output_ids}, row)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    if s.output_ids and (p.frequency_penalty or p.presence_penalty):
        ids, counts = torch.unique(_ids(s.output_ids, row), return_counts=True)
        row[ids] -= p.frequency_penalty * counts + p.presence_penalty


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return upload(list(ids), torch.int64, like.device)


def _select(rows: Tensor, indices: list[int]) -> Tensor:
    """Those rows, in rising order: the tensor itself where they are all."""
    return rows if len(indices) == len(rows) else rows[_ids(indices, rows)]


def _draw(logits: Tensor, samples: Sequence[Sample], rows: Sequence[int]) -> tuple[Tensor, _Cut | None]:
    """One token per row, [n], by inverting the cumulative distribution at the sample's own point.

    rows: the samples' rows in the batch.
    """
    params = [s.params for s in samples]
    scaled = logits / _column([p.temperature for p in params], logits)
    if any(p.min_p > 0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], logits)
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + floor, -math.inf)
    places = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not places:
        return _pick(scaled, samples), None
    uncut = _select(scaled, places)
    kept, short = _keep_candidates(uncut, [params[i] for i in places], _CANDIDATES)
    everywhere = len(places) == len(samples)
    index = _ids(places, logits)
    tokens = _pick(kept if everywhere else scaled.index_copy_(0, index, kept), samples)
    if short is None:
        return tokens, None
    tokens[index] = torch.where(short, _LOOK_FURTHER, tokens[index])
    return tokens, _Cut(rows=[rows[i] for i in places], scaled=uncut, samples=[samples[i] for i in places])


def _pick(kept: Tensor, samples: Sequence[Sample]) -> Tensor:
    """[n] int64"""
    # In float64: the sum over a vocabulary must not lose the unlikely tokens.
    cumulative = torch.softmax(kept, dim=-1).double().cumsum(-1)
    points = upload([[uniform(s.seed, s.index)] for s in samples], torch.float64, kept.device)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).flatten()


def _keep_top(scaled: Tensor, params: Sequence[SamplingParams], num_candidates: int) -> Tensor:
    """Only the top_k likeliest, then only the likeliest that reach top_p; ties of the last one stay."""
    kept, short = _keep_candidates(scaled, params, num_candidates)
    rows = [] if short is None else short.nonzero().flatten().tolist()
    if rows:
        kept[rows], _ = _keep_candidates(scaled[rows], [params[i] for i in rows], scaled.shape[1])
    return kept


def _keep_candidates(
    scaled: Tensor, params: Sequence[SamplingParams], num_candidates: int
) -> tuple[Tensor, Tensor | None]:
    """`_keep_top` of so many of the likeliest, and [n] where they do not reach top_p (None: nowhere)."""
    vocab_size = scaled.shape[1]
    top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    width = min(vocab_size, max([num_candidates, *(p.top_k for p in params)]))
    values = scaled.topk(width, dim=-1).values
    k = _column(top_k, scaled)
    in_k = torch.arange(width, device=scaled.device) < k
    in_k_total = values.masked_fill(~in_k, -math.inf).logsumexp(-1, keepdim=True)
    total = torch.where(k < vocab_size, in_k_total, scaled.logsumexp(-1, keepdim=True))
    mass = (values - total).exp().masked_fill(~in_k, 0.0).cumsum(-1)
    top_p = _column([p.top_p for p in params], scaled)
    # A token stays while the ones before it have not reached top_p.
    stays = in_k & (torch.cat([torch.zeros_like(top_p), mass[:, :-1]], dim=-1) < top_p)
    last = stays.sum(-1, keepdim=True) - 1
    kept = scaled.masked_fill(scaled < values.gather(-1, last), -math.inf)
    if width == vocab_size or max(top_k) < vocab_size:
        return kept, None
    return kept, ((k >= vocab_size) & (mass[:, -1:] < top_p)).flatten()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, torch.float32, like.device)[:, None]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 48 random bits, the same for the same seed and index everywhere."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def _logprobs(raw: Tensor, tokens: Tensor, samples: Sequence[Sample]) -> _Wanted | None:
    counts = {i: s.params.logprobs for i, s in enumerate(samples) if s.params.logprobs is not None}
    if not counts:
        return None
    rows = list(counts)
    vocab_size = raw.shape[1]
    logprobs = torch.log_softmax(_select(raw, rows), dim=-1)
    chosen = logprobs.gather(-1, _select(tokens, rows)[:, None].clamp(0, vocab_size - 1)).flatten()
    values, ids = logprobs.topk(min(max(counts.values()), vocab_size), dim=-1)
    return _Wanted(rows=rows, logprobs=logprobs, chosen=chosen, values=values, ids=ids)
