from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.plots import FIRST_TOKEN, THROUGHPUT, curves, draw, spread, tick_step
from benchmarks.results import Results

SVG = "{http://www.w3.org/2000/svg}"


def test_curves_are_medians_in_rising_order(results: Results) -> None:
    results.measurements.reverse()
    assert curves(results, "B2", "throughput")["ours"] == [(1, 600.0), (10, 590.0), (100, 580.0)]


def test_a_plot_holds_each_side_and_each_point(results: Results, tmp_path: Path) -> None:
    [path] = draw(results, tmp_path / "images")
    assert path.name == THROUGHPUT
    root = ElementTree.parse(path).getroot()
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert {"ours", "peft", "adapters in rotation", "tokens/s"} <= set(texts)
    assert any("A <fast> CPU" in text and "2026-01-02" in text for text in texts)
    assert len(list(root.iter(f"{SVG}circle"))) == 6


def test_more_is_higher(results: Results, tmp_path: Path) -> None:
    [path] = draw(results, tmp_path)
    circles = [
        (float(one.attrib["cx"]), float(one.attrib["cy"]))
        for one in ElementTree.parse(path).getroot().iter(f"{SVG}circle")
    ]
    ours, peft = circles[:3], circles[3:]
    assert [x for x, _ in ours] == [x for x, _ in peft] == sorted(x for x, _ in ours)
    assert peft[0][1] < ours[0][1] < ours[2][1] < peft[2][1]


def test_what_was_not_measured_is_not_drawn(results: Results, tmp_path: Path) -> None:
    results.measurements.clear()
    assert draw(results, tmp_path) == []
    assert not (tmp_path / FIRST_TOKEN).exists()


def test_one_point_is_drawn(results: Results, tmp_path: Path) -> None:
    results.measurements = results.measurements[:1]
    [path] = draw(results, tmp_path)
    assert len(list(ElementTree.parse(path).getroot().iter(f"{SVG}circle"))) == 1


@pytest.mark.parametrize(("highest", "step"), [(1.0, 0.2), (7, 2), (99, 20), (650, 200), (1001, 500), (0, 1)])
def test_ticks_are_round_and_few(highest: float, step: float) -> None:
    assert tick_step(highest) == pytest.approx(step)


def test_labels_do_not_lie_on_each_other() -> None:
    assert spread({"low": 100.0, "high": 10.0, "near": 12.0}, 15) == {"high": 10.0, "near": 25.0, "low": 100.0}
