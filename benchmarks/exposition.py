"""What a running gateway tells Prometheus."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.sides import SideFailed


def exposition(port: int) -> str:
    """The text of its metrics; OSError: it does not listen."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return str(response.read(), "utf-8")


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
