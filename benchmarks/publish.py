"""`python -m benchmarks.publish RESULTS.json`: a run's table into the README, and its plots into docs/images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.conditions import ROOT
from benchmarks.plots import PLOTS, draw
from benchmarks.results import Results, read_results
from benchmarks.table import render_markdown

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_IMAGES = Path("docs") / "images"
_TITLES = {plot.file: plot.title for plot in PLOTS}


def section(results: Results, source: str, images: Sequence[str]) -> str:
    """The README's part: the table, its conditions, where its numbers are, and the plots."""
    parts = [render_markdown(results), f"All values: [{source}]({source}).\n"]
    parts += [f"![{_TITLES[image]}]({(_IMAGES / image).as_posix()})\n" for image in images]
    return "\n".join(parts)


def replace_section(readme: str, text: str) -> str:
    """The README with `text` between its two marks. ValueError where a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main(argv: Sequence[str]) -> None:
    """Write README and plots. Only full runs of a clean working tree are published."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("results", type=Path, help="a file in benchmarks/results")
    path = parser.parse_args(argv).results.resolve()
    results = read_results(path)
    if not path.is_relative_to(ROOT):
        parser.error(f"{path} is not in the repository: published numbers come from a file that is kept with them")
    if results.size != "full" or results.conditions.is_dirty or not results.conditions.commit:
        parser.error("only a full run of a commit, with no file changed, is published")
    images = [image.name for image in draw(results, ROOT / _IMAGES)]
    readme = ROOT / "README.md"
    text = section(results, path.relative_to(ROOT).as_posix(), images)
    readme.write_text(replace_section(readme.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
