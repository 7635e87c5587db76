"""Plots of a results file, as SVG written by hand: a bench of servers needs no library for drawing."""

from dataclasses import dataclass
from html import escape
from math import ceil, floor, log, log10
from pathlib import Path

from benchmarks.results import Results

THROUGHPUT = "benchmark-throughput.svg"
FIRST_TOKEN = "benchmark-first-token.svg"
_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 34, 52
# Readable on white and on black, and apart for most kinds of colour blindness.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")
_INK = "#777"
_LABEL_HEIGHT = 15.0
_MOST_TICKS = 5

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What one plot shows of a results file: the medians of a case's metric over `x`."""

    file: str
    case: str
    metric: str
    title: str
    x_label: str
    y_label: str


PLOTS = (
    Plot(
        file=THROUGHPUT,
        case="B2",
        metric="throughput",
        title="Throughput over the number of adapters",
        x_label="adapters in rotation",
        y_label="tokens/s",
    ),
    Plot(
        file=FIRST_TOKEN,
        case="B3",
        metric="time to first token",
        title="Time to the first token over the number of virtual tokens",
        x_label="virtual tokens",
        y_label="ms",
    ),
)


def curves(results: Results, case: str, metric: str) -> dict[str, list[Point]]:
    """(x, median) of each side, in rising x."""
    found: dict[str, list[Point]] = {}
    for one in results.measurements:
        if (one.case, one.metric) == (case, metric) and one.x is not None:
            found.setdefault(one.side, []).append((one.x, one.median))
    return {side: sorted(points) for side, points in found.items()}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the plots for which there are measurements; their paths."""
    conditions = results.conditions
    where = f"{conditions.cpu}, {conditions.num_cpus} CPUs, {conditions.started[:10]}, {results.size} size"
    written = []
    for plot in PLOTS:
        if lines := curves(results, plot.case, plot.metric):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / plot.file).write_text(svg(plot, lines, where), encoding="utf-8")
            written.append(folder / plot.file)
    return written


def svg(plot: Plot, lines: dict[str, list[Point]], where: str) -> str:
    """One picture: x in steps of equal ratio, y from 0, a line and a label for each side."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    highest = max(y for points in lines.values() for _, y in points)
    step = tick_step(highest)
    top = step * max(1, ceil(highest / step))
    span = log(xs[-1] / xs[0]) or 1.0

    def place(x: float, y: float) -> Point:
        along = log(x / xs[0]) / span
        return (
            _LEFT + along * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_text(_LEFT, 18, where)]
    for number in range(round(top / step) + 1):
        _, y = place(xs[0], number * step)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_INK}" stroke-opacity=".3"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{number * step:,g}", anchor="end"))
    parts += [_text(place(x, 0)[0], _HEIGHT - _BOTTOM + 18, f"{x:,.0f}", anchor="middle") for x in xs]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, plot.x_label, anchor="middle"))
    parts.append(_text(_LEFT - 8, _TOP - 4, plot.y_label, anchor="end"))
    ends = {side: place(*points[-1]) for side, points in lines.items()}
    heights = spread({side: y for side, (_, y) in ends.items()}, _LABEL_HEIGHT)
    for index, (side, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        placed = [place(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in placed]
        parts.append(_text(ends[side][0] + 10, heights[side] + 4, side, colour=colour))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12">\n<title>{escape(plot.title)}</title>\n{body}\n</svg>\n'
    )


def tick_step(highest: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that reaches `highest` in few steps."""
    power = 10.0 ** floor(log10(highest / _MOST_TICKS)) if highest > 0 else 1.0
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * _MOST_TICKS >= highest)


def spread(heights: dict[str, float], least: float) -> dict[str, float]:
    """The heights, moved down where two labels would lie closer than `least`."""
    placed: dict[str, float] = {}
    lowest = float("-inf")
    for side, height in sorted(heights.items(), key=lambda item: item[1]):
        lowest = placed[side] = max(height, lowest + least)
    return placed


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
