"""Choose tokens from logits.

The order of operations is vLLM's: log-probabilities from the untouched logits; logit bias and banned ids;
penalties; greedy rows are done; temperature, min_p, top_k, top_p; a draw. A draw depends on its own row, seed and
index alone, and so is the same in any batch.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from softprompt_api.params import SamplingParams
from torch import Tensor

from softprompt_inference.engine.messages import Logprobs
from softprompt_inference.engine.plan import Sample, Sampled

NOT_FINITE = "the model's logits are not finite"
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
    if not samples:
        return []
    raw = logits.float()
    top, best = raw.max(-1)  # a NaN or +inf anywhere in a row shows in its maximum
    finite = torch.isfinite(top).tolist()
    edited = raw
    if any(_is_edited(s) for s in samples):
        edited = raw.clone()
        for row, s in zip(edited, samples, strict=True):
            _edit(row, s)
        best = edited.argmax(-1)
    chosen = best.tolist()
    drawn = [i for i, s in enumerate(samples) if finite[i] and s.params.temperature >= _LEAST_TEMPERATURE]
    if drawn:
        for i, token_id in zip(drawn, _draw(edited[drawn], [samples[i] for i in drawn]), strict=True):
            chosen[i] = token_id
    logprobs = _logprobs(raw, chosen, samples, finite)
    return [
        Sampled(token_id=token_id, logprobs=logprobs.get(i))
        if finite[i]
        else Sampled(token_id=0, error=NOT_FINITE)
        for i, token_id in enumerate(chosen)
    ]


def _is_edited(s: Sample) -> bool:
    return bool(s.banned_ids or s.params.logit_bias) or _has_penalties(s.params)


def _has_penalties(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def _edit(row: Tensor, s: Sample) -> None:
    """Bias, ban and penalise, in place. row [vocabulary]"""
    p = s.params
    if p.logit_bias:
        row[_ids(p.logit_bias.keys(), row)] += torch.tensor(list(p.logit_bias.values()), device=row.device)
    if s.banned_ids:
        row[_ids(s.banned_ids, row)] = -math.inf
    if p.repetition_penalty != 1.0:
        seen = _ids({*s.prompt_ids, *s.output_ids}, row)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    if s.output_ids and (p.frequency_penalty or p.presence_penalty):
        ids, counts = torch.unique(_ids(s.output_ids, row), return_counts=True)
        row[ids] -= p.frequency_penalty * counts + p.presence_penalty


def _ids(ids: object, like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)  # type: ignore[call-overload]


def _draw(logits: Tensor, samples: Sequence[Sample]) -> list[int]:
    """One token per row by inverting the cumulative distribution at the sample's own point."""
    params = [s.params for s in samples]
    scaled = logits / _column([p.temperature for p in params], logits)
    if any(p.min_p > 0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], logits)
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + floor, -math.inf)
    cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if cut:
        scaled[cut] = _keep_top(scaled[cut], [params[i] for i in cut], _CANDIDATES)
    # In float64: the sum over a vocabulary must not lose the unlikely tokens.
    cumulative = torch.softmax(scaled, dim=-1).double().cumsum(-1)
    points = torch.tensor([[uniform(s.seed, s.index)] for s in samples], dtype=torch.float64, device=logits.device)
    tokens: list[int] = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).flatten().tolist()
    return tokens


def _keep_top(scaled: Tensor, params: Sequence[SamplingParams], num_candidates: int) -> Tensor:
    """Only the top_k likeliest, then only the likeliest that reach top_p; ties of the last one stay."""
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
    short = ((k >= vocab_size) & (mass[:, -1:] < top_p)).flatten().nonzero().flatten().tolist()
    if short and width < vocab_size:
        kept[short] = _keep_top(scaled[short], [params[i] for i in short], vocab_size)
    return kept


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 48 random bits, the same for the same seed and index everywhere."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def _logprobs(
    raw: Tensor, chosen: Sequence[int], samples: Sequence[Sample], finite: Sequence[bool]
) -> dict[int, Logprobs]:
    """By row, for the rows that ask."""
    wanted = {i: s.params.logprobs for i, s in enumerate(samples) if s.params.logprobs is not None and finite[i]}
    if not wanted:
        return {}
    rows = list(wanted)
    logprobs = torch.log_softmax(raw[rows], dim=-1)
    picked = logprobs.gather(-1, _ids([chosen[i] for i in rows], raw)[:, None]).flatten().tolist()
    values, ids = logprobs.topk(min(max(wanted.values()), raw.shape[1]), dim=-1)
    return {
        i: Logprobs(chosen=own, top=list(zip(top_ids[: wanted[i]], top[: wanted[i]], strict=True)))
        for i, own, top_ids, top in zip(rows, picked, ids.tolist(), values.tolist(), strict=True)
    }
