"""Percentiles of what a service has counted between two looks at its metrics."""

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from benchmarks.exposition import percentile_bound
from benchmarks.sides import SideFailed


def test_a_percentile_is_of_what_came_since_under_all_labels() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("wait_seconds", "", ["by"], buckets=(0.001, 0.01, 0.1), registry=registry)

    def told() -> str:
        return generate_latest(registry).decode()

    nothing = told()
    for _ in range(50):
        histogram.labels("lease").observe(5)
    before = told()
    for _ in range(98):
        histogram.labels("lease").observe(0.0005)
    histogram.labels("registry").observe(0.005)
    histogram.labels("registry").observe(0.05)
    after = told()
    assert [percentile_bound(after, before, "wait_seconds", percent) for percent in (50, 99, 100)] == [
        0.001,
        0.01,
        0.1,
    ]
    assert percentile_bound(before, nothing, "wait_seconds", 1) == float("inf")
    with pytest.raises(SideFailed, match="wait_seconds has counted nothing"):
        percentile_bound(after, after, "wait_seconds", 99)
