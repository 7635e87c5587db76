"""What one tenant may hold, alone and beside others."""

from contextlib import ExitStack

import pytest
from softprompt_api.errors import Overloaded
from softprompt_api.shares import Shares


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_alone_a_tenant_may_hold_everything() -> None:
    shares = Shares(4, what="things run")
    expected = pytest.raises(Overloaded, match="4 things run, and at most 4 may")
    with shares.holding("a", 3), shares.holding("a"), expected:
        shares.holding("a").__enter__()
    assert not shares.held


def test_beside_others_a_tenant_leaves_as_much_as_it_has() -> None:
    shares = Shares(9, what="things run")
    with ExitStack() as held:
        held.enter_context(shares.holding("b"))
        for _ in range(4):
            held.enter_context(shares.holding("a"))
        with pytest.raises(Overloaded, match="4 of this tenant's things run, and the rest is for others"):
            shares.holding("a").__enter__()
        held.enter_context(shares.holding("b"))
        shares.holding("c", 3).__enter__()


def test_who_floods_first_gives_way_once_another_has_asked() -> None:
    shares = Shares(4, what="things run")
    flood = [shares.holding("a") for _ in range(4)]
    for one in flood:
        one.__enter__()
    with pytest.raises(Overloaded):
        shares.holding("b").__enter__()
    flood[0].__exit__(None, None, None)
    with pytest.raises(Overloaded, match="for others"):
        shares.holding("a").__enter__()
    with shares.holding("b"):
        assert shares.held == {"a": 3, "b": 1}


def test_who_has_not_asked_for_a_minute_is_not_reckoned_with() -> None:
    clock = Clock()
    shares = Shares(4, what="things run", now=clock)
    with shares.holding("b"):
        pass
    with shares.holding("a", 2):
        with pytest.raises(Overloaded):
            shares.holding("a", 2).__enter__()
        clock.now_s = 61.0
        shares.holding("a", 2).__enter__()
