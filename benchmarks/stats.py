"""Medians, percentiles and shares."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

__all__ = ["equal_share", "gaps", "median", "percentile", "steady_rate"]

# A request counts as running evenly once it has this many tokens: prompts may still be computed before.
_SETTLED_TOKENS = 4


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `percent` of all do not exceed."""
    if not values:
        raise ValueError("no values")
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of positions with equal token ids; ValueError where the lengths differ."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def gaps(token_times_s: Sequence[Sequence[float]]) -> list[float]:
    """All times between one token of a request and its next."""
    return [later - one for times in token_times_s for one, later in pairwise(times)]


def steady_rate(token_times_s: Sequence[Sequence[float]], *, settled: int = _SETTLED_TOKENS) -> float:
    """Tokens per second while all requests decode at the same time.

    The window begins when the last request has its token number `settled`, and ends with the first request's end.
    ValueError where there is no such window.
    """
    if not token_times_s or min(len(times) for times in token_times_s) <= settled:
        raise ValueError(f"each request needs more than {settled} tokens")
    begin = max(times[settled - 1] for times in token_times_s)
    end = min(times[-1] for times in token_times_s)
    if end <= begin:
        raise ValueError("no time in which all requests decode: ask for more tokens of each")
    tokens = sum(1 for times in token_times_s for time in times if begin < time <= end)
    return tokens / (end - begin)
