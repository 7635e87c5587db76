"""Plots of a results file: throughput over the number of adapters, time to the first token over virtual tokens."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.results import Results

THROUGHPUT = "benchmark-throughput.svg"
FIRST_TOKEN = "benchmark-first-token.svg"


def curves(results: Results, case: str, metric: str) -> dict[str, list[tuple[float, float]]]:
    """(x, median) of each side, in rising x."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in results.measurements:
        if (one.case, one.metric) == (case, metric) and one.x is not None:
            found.setdefault(one.side, []).append((one.x, one.median))
    return {side: sorted(points) for side, points in found.items()}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the plots for which there are measurements; their paths."""
    wanted = [
        (THROUGHPUT, "B2", "throughput", "adapters in rotation", "tokens/s"),
        (FIRST_TOKEN, "B3", "time to first token", "virtual tokens, warm", "ms to the first token"),
    ]
    written = []
    for name, case, metric, x_label, y_label in wanted:
        if lines := curves(results, case, metric):
            folder.mkdir(parents=True, exist_ok=True)
            _figure(lines, x_label, y_label, _caption(results)).savefig(folder / name, metadata={"Date": None})
            written.append(folder / name)
    return written


def _figure(lines: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, caption: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for side, points in lines.items():
        axes.plot(*_columns(points), marker="o", label=side)
    axes.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(caption, fontsize="small")
    axes.legend()
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _caption(results: Results) -> str:
    conditions = results.conditions
    return f"{conditions.cpu}, {conditions.num_cpus} CPUs, {conditions.started[:10]}, {results.size} size"
