"""The final table, as text for a terminal and as Markdown."""

from collections.abc import Sequence

from benchmarks.results import Results, Row

_HEAD = ("case", "what", "ours", "peer", "peer's", "compared", "must", "stretch", "met?", "of the limit")


def render(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    cells = [list(_HEAD), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    notes = _notes(rows)
    return "\n".join([line.rstrip() for line in lines] + ["", *notes] * bool(notes))


def render_checks(results: Results) -> str:
    """Comparisons of outputs, and what was not measured, a line each."""
    lines = [
        f"{check.case} {check.what}: {check.share:.2%} of ids equal"
        + " (ties may differ)" * (not check.is_required)
        for check in results.checks
    ]
    lines += [f"{name}: not measured: {reason}" for name, reason in results.unmeasured.items()]
    return "\n".join(lines)


def render_markdown(results: Results) -> str:
    """The table with where, how and with what it was measured."""
    conditions, limits = results.conditions, results.limits[0]
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in results.rows]
    versions = ", ".join(f"{name} {version}" for name, version in _all_versions(results).items())
    repeats = "one run" if results.num_repeats == 1 else f"medians of {results.num_repeats} runs, sides in turn"
    load = conditions.load_average[0]
    device = "" if limits.device == "cpu" else f"{limits.device}, "
    lines += [
        "",
        f"Measured {conditions.started[:10]} at commit {conditions.commit[:7]} on {device}"
        f"{conditions.num_cpus} CPUs ({conditions.cpu}), load average {load:.2f} before the start; "
        f"{results.size} size, {repeats}; {versions}. "
        f"Limits measured in the same run: {_per_s(limits.copy_bytes_per_s, 'GB')}, "
        f"{_per_s(limits.matmul_flops_per_s, 'GFLOP')} in {limits.dtype}.",
    ]
    lines += [f"* {note}" for note in _notes(results.rows)]
    lines += [f"* {name}: not measured: {reason}" for name, reason in results.unmeasured.items()]
    return "\n".join(lines) + "\n"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Each note once, with the row that has it, or with the cases of all that do."""
    noted: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.note:
            noted.setdefault((row.peer or "ours", row.note), []).append(row)
    lines = []
    for (peer, note), those in noted.items():
        cases = ", ".join(dict.fromkeys(row.case for row in those))
        lines.append(f"{cases} {those[0].what}, {peer}: {note}" if len(those) == 1 else f"{cases}, {peer}: {note}")
    return lines


def _all_versions(results: Results) -> dict[str, str]:
    merged = {"Python": results.conditions.python, **results.conditions.versions}
    for side, versions in results.versions.items():
        for name, version in versions.items():
            if merged.setdefault(name, version) != version:
                merged[f"{name} of {side}"] = version
    return merged


def _per_s(value: float, unit: str) -> str:
    return f"{value / 1e9:,.0f} {unit}/s"


def _cells(row: Row) -> list[str]:
    met = {True: "yes", False: "NO", None: "–"}[row.is_met]
    if row.must is not None and row.compared is None:
        met = "not measured"
    return [
        row.case,
        row.what,
        _number(row.ours, row.unit),
        row.peer or "–",
        _number(row.peer_value, row.unit),
        _figures(row.compared),
        _goal(row.must, row.at_most),
        _goal(row.stretch, row.at_most),
        met,
        "–" if row.floor_share is None else f"{row.floor_share:.0%}",
    ]


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{_figures(value)} {unit}".strip()


def _figures(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _goal(value: float | None, at_most: bool) -> str:
    return "–" if value is None else f"{'≤' if at_most else '≥'} {value:g}"
