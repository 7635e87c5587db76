import pytest

from benchmarks.sizes import FULL, QUICK, SIZES, Size


def test_a_full_run_has_medians_of_three() -> None:
    assert FULL.num_repeats >= 3
    assert FULL.num_starts >= 3


def test_a_quick_run_does_less_of_everything() -> None:
    assert QUICK.num_requests < FULL.num_requests
    assert max(QUICK.adapter_counts) < max(FULL.adapter_counts)
    assert QUICK.registered < FULL.registered
    assert QUICK.asked < FULL.asked


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes_start_at_one_adapter(size: Size) -> None:
    assert size.adapter_counts[0] == 1
    assert size.few_requests <= size.num_requests
    assert size.asked <= size.registered
