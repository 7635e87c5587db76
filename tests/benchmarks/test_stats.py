import pytest

from benchmarks.stats import equal_share, gaps, percentile, steady_rate


def test_the_percentile_is_a_value_that_was_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 50) == 3.0
    assert percentile(values, 99) == 5.0
    assert percentile(values, 0) == 1.0


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_equal_ids_are_counted_by_position() -> None:
    assert equal_share([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert equal_share([[1]], [[1]]) == 1.0


def test_outputs_of_other_lengths_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        equal_share([[1, 2]], [[1]])


def test_gaps_lie_within_requests() -> None:
    assert gaps([[0.0, 1.0, 3.0], [10.0, 11.0]]) == [1.0, 2.0, 1.0]


def test_the_steady_rate_counts_while_all_decode() -> None:
    early = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    late = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    # From the late one's fourth token at 5 to the early one's end at 6, each gives one.
    assert steady_rate([early, late]) == 2.0


def test_without_common_time_there_is_no_steady_rate() -> None:
    with pytest.raises(ValueError, match="more than"):
        steady_rate([[0.0, 1.0]])
    with pytest.raises(ValueError, match="no time"):
        steady_rate([[0.0, 1.0, 2.0, 3.0, 4.0], [9.0, 10.0, 11.0, 12.0, 13.0]])
