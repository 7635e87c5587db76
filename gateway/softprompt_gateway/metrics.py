"""What the gateway counts, and the load of engines as their inference services tell it, for Prometheus."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from softprompt_api.inference.v1.inference_pb2 import GetLoadResponse, ResidentTier

from softprompt_gateway.outcome import Outcome
from softprompt_gateway.vllm_metrics import EngineCollector, RequestMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_RESOLVE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
# Labels take values from closed sets only: a client can invent methods and paths without end.
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

# No adapter has this name: those of names begin with a letter or digit.
_REST = "(other)"

_REPLICA = ["replica"]
_GAUGES = {
    "running": "Sequences in the running batch",
    "waiting": "Sequences that wait for pages or a place",
    "used_pages": "KV pages in use by sequences",
    "num_pages": "All KV pages",
    "resident_adapters": "Adapters whose rows are on the device",
}
_COUNTERS = {
    "computed_prompt_tokens": "Prompt positions computed",
    "cached_prompt_tokens": "Prompt positions taken from the prefix cache",
    "generated_tokens": "Tokens generated",
    "preemptions": "Times a sequence lost its pages to an older one",
}


class _EngineLoads(Collector):
    """The last load that each replica told, its adapters' too; None: it did not answer."""

    def __init__(self) -> None:
        self.latest: Mapping[str, GetLoadResponse | None] = {}

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("softprompt_engine_up", "Whether the engine answered", labels=_REPLICA)
        for replica, load in self.latest.items():
            up.add_metric([replica], float(load is not None))
        yield up
        loads = {replica: load for replica, load in self.latest.items() if load is not None}
        for family, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in names.items():
                metric = family(f"softprompt_engine_{name}", text, labels=_REPLICA)
                for replica, load in loads.items():
                    metric.add_metric([replica], getattr(load, name))
                yield metric
        yield from _adapter_tiers(loads)


def _adapter_tiers(loads: Mapping[str, GetLoadResponse]) -> Iterable[Metric]:
    prefix, labels = "softprompt_inference_adapter", [*_REPLICA, "tier"]
    held = GaugeMetricFamily(f"{prefix}s", "Adapters in memory; one may be in both tiers", labels=labels)
    size = GaugeMetricFamily(f"{prefix}_bytes", "Bytes of adapters in memory", labels=labels)
    hits = CounterMetricFamily(
        f"{prefix}_hits",
        "Requests by the fastest tier that had their adapter; registry: none had it",
        labels=labels,
    )
    for replica, load in loads.items():
        for tier in load.adapter_tiers:
            place = [replica, tier_name(tier.tier)]
            held.add_metric(place, tier.num_adapters)
            size.add_metric(place, tier.size_bytes)
            hits.add_metric(place, tier.hits)
        hits.add_metric([replica, "registry"], load.adapter_misses)
    return held, size, hits


def tier_name(tier: int) -> str:
    """ "device" or "host"."""
    return ResidentTier.Name(ResidentTier.ValueType(tier)).removeprefix("RESIDENT_TIER_").lower()


class Metrics:
    """The metrics of one app, in a registry of its own.

    Args:
        count_known: how many adapters the gateway has heard of.
        max_adapters: how many have counters of their own.
    """

    def __init__(self, count_known: Callable[[], int], max_adapters: int) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "softprompt_gateway_requests",
            "Answered requests",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "softprompt_gateway_request_seconds",
            "Time from a request's headers to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "softprompt_gateway_requests_in_progress", "Requests being answered", registry=self.registry
        )
        self._tokens = Counter(
            "softprompt_gateway_tokens", "Tokens of generations", ["kind"], registry=self.registry
        )
        self._adapter_requests = Counter(
            "softprompt_gateway_adapter_requests",
            "Requests that used an adapter",
            ["adapter"],
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "softprompt_gateway_adapter_tokens",
            "Tokens of requests that used an adapter",
            ["adapter", "kind"],
            registry=self.registry,
        )
        self._resolve_seconds = Histogram(
            "softprompt_gateway_resolve_seconds",
            "Time to find the versions that a request's adapters stand for",
            ["by"],
            buckets=_RESOLVE_SECONDS,
            registry=self.registry,
        )
        self._adapter_names = _FirstNames(max_adapters)
        known = Gauge("softprompt_gateway_known_adapters", "Names that /v1/models lists", registry=self.registry)
        known.set_function(count_known)
        self._engines, self._engines_of_vllm = _EngineLoads(), EngineCollector()
        self.registry.register(self._engines)
        self.registry.register(self._engines_of_vllm)
        self._requests_of_vllm = RequestMetrics(self.registry)

    def answered(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answer; `route` is the path's template, never the path."""
        self._requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def resolved(self, by: Literal["lease", "registry"], seconds: float) -> None:
        """Count that a request's adapters were found: by what the gateway knows for sure, or by asking."""
        self._resolve_seconds.labels(by).observe(seconds)

    def generated(self, outcome: Outcome) -> None:
        """Count what became of one request that generated."""
        usage = outcome.usage
        for kind in ("prompt", "completion", "virtual", "cached"):
            self._tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))
        for adapter in map(self._adapter_names.label, outcome.adapters):
            self._adapter_requests.labels(adapter).inc()
            self._adapter_tokens.labels(adapter, "prompt").inc(usage.prompt_tokens)
            self._adapter_tokens.labels(adapter, "completion").inc(usage.completion_tokens)
        self._requests_of_vllm.ended(outcome)

    def exposition(self, loads: Mapping[str, GetLoadResponse | None]) -> bytes:
        """The text that Prometheus reads."""
        self._engines.latest = self._engines_of_vllm.latest = loads
        return generate_latest(self.registry)


class _FirstNames:
    """Names as values of a label: so many of them, the first that come, and one value for the rest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        """The value for a name."""
        if name not in self._names and len(self._names) < self._most:
            self._names.add(name)
        return name if name in self._names else _REST
