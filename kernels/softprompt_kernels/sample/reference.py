"""`sample` in plain torch: the CPU path, and what the Triton kernel is held to."""

import math

import torch
from torch import Tensor

NO_TOKEN = -1
# So many of the likeliest tokens nearly always hold the mass that top_p asks for; sorting a whole vocabulary costs
# many times more.
_CANDIDATES = 1024


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    points: Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """Arguments as in `softprompt_kernels.sample`."""
    x = logits.float()
    if allowed is not None:
        x = _keep_allowed(x, allowed)
    top, tokens = x.max(-1)  # a NaN or +inf anywhere in a row shows in its maximum
    is_drawn = temperature > 0
    if is_drawn.any():
        columns = (values[is_drawn] for values in (temperature, top_k, top_p, min_p, points))
        tokens[is_drawn] = _draw(_select(x, is_drawn), *columns)
    return torch.where(top.isfinite(), tokens, NO_TOKEN)


def _keep_allowed(x: Tensor, allowed: Tensor) -> Tensor:
    """−inf where a token may not be chosen; of a copy. Mostly few rows have such tokens, and unpacking is slow."""
    is_limited = (allowed != -1).any(-1)
    bits = allowed[is_limited][..., None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
    is_banned = bits.flatten(1)[:, : x.shape[1]] == 0
    kept = x.clone()
    kept[is_limited] = x[is_limited].masked_fill(is_banned, -math.inf)
    return kept


def _select(rows: Tensor, wanted: Tensor) -> Tensor:
    """Those rows: the tensor itself where they are all."""
    return rows if wanted.all() else rows[wanted]


def _draw(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, points: Tensor) -> Tensor:
    scaled = x / temperature.float()[:, None]
    if (min_p > 0).any():
        floor = min_p.log().float()[:, None]
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + floor, -math.inf)
    is_cut = ((top_k > 0) & (top_k < x.shape[1])) | (top_p < 1)
    if is_cut.any():
        kept = _keep_top(_select(scaled, is_cut), top_k[is_cut], top_p[is_cut])
        scaled = kept if is_cut.all() else scaled.index_put_((is_cut,), kept)
    # In float64: the sum over a vocabulary must not lose the unlikely tokens.
    cumulative = torch.softmax(scaled, dim=-1).double().cumsum(-1)
    return torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True).flatten()


def _keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Only the top_k likeliest, then only the likeliest that reach top_p; ties of the last one stay."""
    vocab_size = scaled.shape[1]
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)[:, None]
    p = torch.where(top_p < 1, top_p, math.inf).float()[:, None]
    width = min(vocab_size, max(_CANDIDATES, int(top_k.max())))
    kept, reached = _keep_candidates(scaled, k, p, width)
    if not reached.all():
        kept[~reached], _ = _keep_candidates(scaled[~reached], k[~reached], p[~reached], vocab_size)
    return kept


def _keep_candidates(scaled: Tensor, k: Tensor, p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`_keep_top` of so many of the likeliest, and [n] whether they are enough."""
    vocab_size = scaled.shape[1]
    values = scaled.topk(width, dim=-1).values
    in_k = torch.arange(width) < k
    in_k_total = values.masked_fill(~in_k, -math.inf).logsumexp(-1, keepdim=True)
    total = torch.where(k < vocab_size, in_k_total, scaled.logsumexp(-1, keepdim=True))
    mass = (values - total).exp().masked_fill(~in_k, 0.0).cumsum(-1)
    # A token stays while the ones before it have not reached top_p; the first always does.
    stays = in_k & (torch.cat([torch.zeros_like(p), mass[:, :-1]], dim=-1) < p)
    last = (stays.sum(-1, keepdim=True) - 1).clamp(min=0)
    kept = scaled.masked_fill(scaled < values.gather(-1, last), -math.inf)
    return kept, ((k <= width) | (mass[:, -1:] >= p)).flatten()
