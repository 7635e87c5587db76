"""The figures of a run, by the names and in the order that vLLM's users know."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from softprompt.bench.server import Outcome

GOALS = ("ttft", "tpot", "e2el")
_WIDTH = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean, median and 99th percentile of a time, in milliseconds."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Spread":
        """The spread of times in seconds; zeros where there are none."""
        values = sorted(1000 * value for value in seconds)
        if not values:
            return cls(mean=0.0, median=0.0, p99=0.0)
        return cls(mean=fmean(values), median=percentile(values, 50), p99=percentile(values, 99))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one run. Times are in milliseconds where not said otherwise; only whole answers count.

    Attributes:
        goodput: requests per second that met every goal; None where none was set.
        first_error: of the first request, in order of sending, that failed.
    """

    successful_requests: int
    failed_requests: int
    duration_s: float
    input_tokens: int
    generated_tokens: int
    request_throughput: float
    goodput: float | None
    output_token_throughput: float
    total_token_throughput: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    first_error: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """For a terminal."""
        lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
        lines.append(_line("Successful requests:", self.successful_requests))
        lines.append(_line("Failed requests:", self.failed_requests))
        lines.append(_line("Benchmark duration (s):", self.duration_s))
        lines.append(_line("Total input tokens:", self.input_tokens))
        lines.append(_line("Total generated tokens:", self.generated_tokens))
        lines.append(_line("Request throughput (req/s):", self.request_throughput))
        if self.goodput is not None:
            lines.append(_line("Request goodput (req/s):", self.goodput))
        lines.append(_line("Output token throughput (tok/s):", self.output_token_throughput))
        lines.append(_line("Total token throughput (tok/s):", self.total_token_throughput))
        for title, name, spread in (
            ("Time to First Token", "TTFT", self.ttft),
            ("Time per Output Token (excl. 1st token)", "TPOT", self.tpot),
            ("Inter-token Latency", "ITL", self.itl),
            ("End-to-end Latency", "E2EL", self.e2el),
        ):
            lines.append(title.center(_WIDTH, "-"))
            lines += [
                _line(f"{word} {name} (ms):", value)
                for word, value in (("Mean", spread.mean), ("Median", spread.median), ("P99", spread.p99))
            ]
        lines.append("=" * _WIDTH)
        return "\n".join(lines)


def make_report(outcomes: Sequence[Outcome], duration_s: float, goals: Mapping[str, float]) -> Report:
    """The figures of a run.

    Args:
        goals: the most milliseconds that a good request may take, by names of GOALS.
    """
    whole = [outcome for outcome in outcomes if not outcome.error]
    generated = sum(outcome.output_tokens for outcome in whole)
    given = sum(outcome.input_tokens for outcome in whole)
    good = sum(meets(outcome, goals) for outcome in whole)
    return Report(
        successful_requests=len(whole),
        failed_requests=len(outcomes) - len(whole),
        duration_s=duration_s,
        input_tokens=given,
        generated_tokens=generated,
        request_throughput=len(whole) / duration_s,
        goodput=good / duration_s if goals else None,
        output_token_throughput=generated / duration_s,
        total_token_throughput=(given + generated) / duration_s,
        ttft=Spread.of(outcome.ttft_s for outcome in whole),
        tpot=Spread.of(outcome.tpot_s for outcome in whole if outcome.tpot_s is not None),
        itl=Spread.of(itl_s for outcome in whole for itl_s in outcome.itl_s),
        e2el=Spread.of(outcome.end_s for outcome in whole),
        first_error=next((outcome.error for outcome in outcomes if outcome.error), ""),
    )


def meets(outcome: Outcome, goals: Mapping[str, float]) -> bool:
    """Whether a whole answer kept to every goal; one of a single token keeps to any time per token."""
    took_s = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s or 0.0, "e2el": outcome.end_s}
    return all(1000 * took_s[name] <= most_ms for name, most_ms in goals.items())


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted values, interpolated linearly between neighbours, as numpy does."""
    position = (len(values) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


def _line(name: str, value: float) -> str:
    shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
    return f"{name:<{_WIDTH - 14}}{shown:>14}"
