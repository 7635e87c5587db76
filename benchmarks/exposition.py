"""What a running gateway tells Prometheus."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.sides import SideFailed


def exposition(port: int) -> str:
    """The text of its metrics; OSError: it does not listen."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return str(response.read(), "utf-8")


def percentile_bound(text: str, before: str, name: str, percent: float) -> float:
    """The bound of a histogram's bucket below which so many percent of what came since `before` lie.

    Raises SideFailed as `counted` does, and where nothing came.
    """
    bounds = {
        sample.labels["le"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"{name}_bucket"
    }
    since = {float(le): _since(text, before, f"{name}_bucket", le=le) for le in bounds}
    total = since.get(float("inf"), 0)
    if not total:
        raise SideFailed(f"{name} has counted nothing")
    return min(bound for bound, count in since.items() if count >= total * percent / 100)


def _since(text: str, before: str, name: str, **labels: str) -> float:
    return counted(text, name, **labels) - (counted(before, name, **labels) if f"{name}{{" in before else 0)


def counted(text: str, name: str, **labels: str) -> float:
    """The sum of all values of a metric that have these labels, whatever others they have.

    Raises SideFailed where there is none: a benchmark must not take a metric of another name for 0.
    """
    values = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise SideFailed(f"/metrics has no {name} with {labels}")
    return sum(values)
