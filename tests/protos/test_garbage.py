"""What a start has made is set aside; what comes after it is collected."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from softprompt_api.garbage import start_collecting


class _Ring:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.enable()


def test_what_a_start_has_made_is_not_looked_at_again_and_garbage_is_collected() -> None:
    gc.disable()
    kept, num_frozen = _Ring(), gc.get_freeze_count()
    start_collecting()
    assert gc.isenabled()
    assert gc.get_freeze_count() > num_frozen
    assert not any(one is kept for one in gc.get_objects())
    gone = weakref.ref(_Ring())
    gc.collect()
    assert gone() is None
