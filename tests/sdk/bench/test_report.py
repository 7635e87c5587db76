"""Figures of a run, against values worked out by hand."""

import pytest
from softprompt.bench.report import Spread, make_report, meets, percentile
from softprompt.bench.server import Outcome
from softprompt.bench.workload import Request


def outcome(*event_s: float, end_s: float, given: int = 10, generated: int, error: str = "") -> Outcome:
    request = Request(model="m", prompt="p", output_len=generated, send_at_s=0.0)
    return Outcome(
        request=request,
        event_s=list(event_s),
        end_s=end_s,
        input_tokens=given,
        output_tokens=generated,
        error=error,
    )


FAST = outcome(0.1, 0.2, 0.4, end_s=0.5, generated=3)
SLOW = outcome(0.3, 1.3, end_s=1.5, given=20, generated=5)
BROKEN = outcome(0.1, end_s=9.0, generated=7, error="503: the engine has ended")


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([1.0, 2.0], 50, 1.5),
        ([1.0, 2.0, 4.0], 50, 2.0),
        # numpy.percentile(range(101), 99) and of (10, 20, 30, 40), 99
        ([float(value) for value in range(101)], 99, 99.0),
        ([10.0, 20.0, 30.0, 40.0], 99, 39.7),
        ([1.0, 2.0, 3.0], 100, 3.0),
    ],
)
def test_percentiles_are_interpolated(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_spread_is_in_milliseconds_and_needs_no_order() -> None:
    spread = Spread.of([0.3, 0.1, 0.2])
    assert (spread.mean, spread.median, spread.p99) == pytest.approx((200.0, 200.0, 298.0))
    assert Spread.of([]) == Spread(mean=0.0, median=0.0, p99=0.0)


def test_times_of_one_answer() -> None:
    assert FAST.ttft_s == 0.1
    assert FAST.tpot_s == pytest.approx(0.2)  # 0.4 s for two tokens
    assert FAST.itl_s == pytest.approx([0.1, 0.2])


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert outcome(0.1, end_s=0.2, generated=1).tpot_s is None


def test_an_answer_without_text_has_its_first_token_at_its_end() -> None:
    assert outcome(end_s=0.7, generated=2).ttft_s == 0.7


def test_figures_are_of_whole_answers_alone() -> None:
    report = make_report([FAST, BROKEN, SLOW], 2.0, {})
    assert (report.successful_requests, report.failed_requests) == (2, 1)
    assert (report.input_tokens, report.generated_tokens) == (30, 8)
    assert report.request_throughput == 1.0
    assert report.output_token_throughput == 4.0
    assert report.total_token_throughput == 19.0
    assert report.ttft.mean == pytest.approx(200.0)
    assert report.tpot.mean == pytest.approx(250.0)
    assert report.itl.median == pytest.approx(200.0)
    assert report.e2el.p99 == pytest.approx(1490.0)
    assert report.goodput is None
    assert report.first_error == "503: the engine has ended"


@pytest.mark.parametrize(
    ("goals", "goodput"),
    [({"ttft": 200.0}, 0.5), ({"ttft": 300.0}, 1.0), ({"ttft": 300.0, "tpot": 250.0}, 0.5), ({"e2el": 1.0}, 0.0)],
)
def test_goodput_counts_answers_that_meet_every_goal(goals: dict[str, float], goodput: float) -> None:
    assert make_report([FAST, BROKEN, SLOW], 2.0, goals).goodput == goodput


def test_one_token_meets_any_time_per_token() -> None:
    assert meets(outcome(0.1, end_s=0.2, generated=1), {"tpot": 0.001})


def test_the_table_has_vllms_names() -> None:
    table = make_report([FAST, SLOW], 2.0, {"ttft": 200.0}).table()
    lines = {line.partition(":")[0]: line.rpartition(" ")[2] for line in table.splitlines() if ":" in line}
    assert lines["Successful requests"] == "2"
    assert lines["Benchmark duration (s)"] == "2.00"
    assert lines["Total generated tokens"] == "8"
    assert lines["Request goodput (req/s)"] == "0.50"
    assert lines["Median TTFT (ms)"] == "200.00"
    assert lines["P99 E2EL (ms)"] == "1,490.00"
    assert {len(line) for line in table.splitlines()} == {50}


def test_a_run_in_which_all_failed_has_a_table_too() -> None:
    report = make_report([BROKEN], 1.0, {"ttft": 1.0})
    assert "Successful requests:" in report.table()
    assert report.goodput == 0.0
