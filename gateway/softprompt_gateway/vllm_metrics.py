"""Metrics by the names that vLLM's users know, for dashboards and autoscalers that were made for it."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from softprompt_api.inference.v1.inference_pb2 import GetLoadResponse

from softprompt_gateway.outcome import Outcome

_MODEL = "model_name"
_LABELS = (_MODEL, "engine")
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_PER_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50)
_REQUEST_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800)


def _num_prompt_positions(load: GetLoadResponse) -> int:
    return load.computed_prompt_tokens + load.cached_prompt_tokens


_GAUGES: Sequence[tuple[str, str, Callable[[GetLoadResponse], float]]] = (
    ("num_requests_running", "Sequences in the running batch", lambda load: load.running),
    ("num_requests_waiting", "Sequences that wait for pages or a place", lambda load: load.waiting),
    ("kv_cache_usage_perc", "KV pages in use, 1 is all", lambda load: load.used_pages / max(1, load.num_pages)),
)
_COUNTERS: Sequence[tuple[str, str, Callable[[GetLoadResponse], float]]] = (
    ("prompt_tokens", "Prompt positions, computed or cached", _num_prompt_positions),
    ("generation_tokens", "Tokens generated", lambda load: load.generated_tokens),
    (
        "prefix_cache_queries",
        "Prompt positions looked for in the prefix cache",
        _num_prompt_positions,
    ),
    (
        "prefix_cache_hits",
        "Prompt positions found in the prefix cache",
        lambda load: load.cached_prompt_tokens,
    ),
    ("num_preemptions", "Times a sequence lost its pages to an older one", lambda load: load.preemptions),
)


class EngineCollector(Collector):
    """What each inference service last told of its load; None: it did not answer.

    The label `engine` is its place among them.
    """

    def __init__(self) -> None:
        self.latest: Mapping[str, GetLoadResponse | None] = {}

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand."""
        loads = {str(place): load for place, load in enumerate(self.latest.values()) if load is not None}
        if not loads:
            return
        for family, metrics in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, value in metrics:
                metric = family(f"vllm:{name}", text, labels=_LABELS)
                for engine, load in loads.items():
                    metric.add_metric((load.base_model_id, engine), value(load))
                yield metric
        names = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "LoRAs that requests use or wait for", labels=names)
        told = {
            (str(load.max_loras), ",".join(load.waiting_loras), ",".join(load.running_loras)): None
            for load in loads.values()
            if load.max_loras
        }
        for values in told:  # engines that say the same say it once
            info.add_metric(values, time.time())
        if told:
            yield info


class RequestMetrics:
    """What became of requests, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._success = Counter(
            "vllm:request_success",
            "Choices that ended, by why",
            [_MODEL, "finished_reason"],
            registry=registry,
        )
        self._end_to_end, self._first_token, self._mean = (
            Histogram(f"vllm:{name}_seconds", text, [_MODEL], buckets=buckets, registry=registry)
            for name, text, buckets in (
                ("e2e_request_latency", "Time from a request's headers to its last token", _REQUEST_S),
                ("time_to_first_token", "Time from a request's headers to its first token", _FIRST_TOKEN_S),
                ("request_time_per_output_token", "Mean time between a request's tokens", _PER_TOKEN_S),
            )
        )
        self._between = WeightedHistogram(
            "vllm:inter_token_latency_seconds",
            "Time between tokens: each request's mean, once for each of its tokens but the first",
            _PER_TOKEN_S,
        )
        registry.register(self._between)

    def ended(self, outcome: Outcome) -> None:
        """Count what became of a request."""
        for reason in outcome.reasons:
            self._success.labels(outcome.model, reason).inc()
        if outcome.first_token_s is None:
            return
        self._first_token.labels(outcome.model).observe(outcome.first_token_s)
        if not outcome.is_whole:
            return
        self._end_to_end.labels(outcome.model).observe(outcome.duration_s)
        if outcome.num_intervals:
            # Choices of one request come side by side.
            mean_s = (outcome.duration_s - outcome.first_token_s) * len(outcome.reasons) / outcome.num_intervals
            self._mean.labels(outcome.model).observe(mean_s)
            self._between.observe(outcome.model, mean_s, times=outcome.num_intervals)


class WeightedHistogram(Collector):
    """A histogram in which one observation may count many times."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, [float(bound) for bound in bounds]
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, value: float, *, times: int) -> None:
        """Count a value of a model."""
        counts = self._counts.setdefault(model, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, value)] += times
        self._sums[model] = self._sums.get(model, 0.0) + value * times

    def collect(self) -> Iterable[Metric]:
        """The metric as it stands."""
        family = HistogramMetricFamily(self._name, self._text, labels=[_MODEL])
        for model, counts in self._counts.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([model], buckets, self._sums[model])
        yield family
