import json
from pathlib import Path

import pytest

from benchmarks.results import SCHEMA, Results, Row, read_results


def test_what_is_written_is_read_again(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results.write(path)
    assert read_results(path) == results


def test_the_file_names_commit_versions_and_schema(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["schema"] == SCHEMA
    assert data["conditions"]["commit"] == "0123456789abcdef"
    assert data["versions"]["peft"]["peft"] == "0.21.2"


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema"):
        read_results(path)


def test_the_default_name_says_when_what_and_how_much(results: Results) -> None:
    assert results.default_path().name == "2026-01-02T030405-0123456-full.json"


def test_a_measurement_is_its_median(results: Results) -> None:
    assert results.measurements[0].median == 600.0


@pytest.mark.parametrize(
    ("compared", "must", "at_most", "is_met"),
    [
        (2.0, 2.0, False, True),
        (1.9, 2.0, False, False),
        (2.0, 2.0, True, True),
        (2.1, 2.0, True, False),
        (None, 2.0, False, None),
        (2.0, None, False, None),
    ],
)
def test_a_goal_is_met_missed_or_open(
    compared: float | None, must: float | None, at_most: bool, is_met: bool | None
) -> None:
    row = Row(case="B1", what="", unit="", ours=1.0, compared=compared, must=must, at_most=at_most)
    assert row.is_met is is_met
