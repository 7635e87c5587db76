"""Who is let in: on a clock that only the tests move."""

import heapq
import math
import random
from collections import deque
from contextlib import AbstractContextManager, ExitStack, suppress

import pytest
from softprompt_api.errors import Overloaded
from softprompt_inference.admission import Admission
from softprompt_inference.engine.messages import Stats

SLOTS = 8
SERVICE_S = 0.5
CAPACITY = SLOTS / SERVICE_S
MAX_WAIT_S = 0.5


class Place:
    """An engine with some slots, in which each completion takes the same time.

    Attributes:
        now_s: the time.
        waits: how long those waited who have started.
        num_elsewhere: completions that wait for something else.
    """

    def __init__(self, *, max_open: int = 1000, max_wait_s: float = MAX_WAIT_S) -> None:
        self.now_s = 0.0
        self.num_elsewhere = 0
        self.admission = Admission(
            max_open=max_open,
            max_wait_s=max_wait_s,
            load=lambda: self._stats,
            num_elsewhere=lambda: self.num_elsewhere,
            now=lambda: self.now_s,
        )
        self.waits: list[float] = []
        self._stats = Stats()
        self._ends: list[tuple[float, int, AbstractContextManager[None]]] = []
        self._line: deque[tuple[float, AbstractContextManager[None]]] = deque()

    def ask(self, tenant: str = "") -> None:
        """Ask for one completion; Overloaded."""
        admitted = self.admission.admitted(1, tenant)
        admitted.__enter__()
        self._line.append((self.now_s, admitted))
        self._start()

    def pass_until(self, now_s: float) -> None:
        """Let time pass."""
        while self._ends and self._ends[0][0] <= now_s:
            self.now_s = self._ends[0][0]
            # What ends in one step is told together; others start in the next.
            while self._ends and self._ends[0][0] == self.now_s:
                _, _, admitted = heapq.heappop(self._ends)
                self.admission.measure(1)
                admitted.__exit__(None, None, None)
            self._start()
        self.now_s = now_s

    def _start(self) -> None:
        while self._line and len(self._ends) < SLOTS:
            came_s, admitted = self._line.popleft()
            self.waits.append(self.now_s - came_s)
            heapq.heappush(self._ends, (self.now_s + SERVICE_S, len(self.waits), admitted))
        self._stats = Stats(running=len(self._ends), waiting=len(self._line))
        self.admission.measure()


def goodput(load: float, *, max_wait_s: float, seconds: float = 200.0) -> float:
    """Completions in a second that waited no longer than twice what they may, where so much is asked for."""
    rng, place, due_s = random.Random(int(load * 100)), Place(max_wait_s=max_wait_s), 0.0
    while due_s < seconds:
        place.pass_until(due_s)
        with suppress(Overloaded):
            place.ask()
        due_s += rng.expovariate(load * CAPACITY)
    return sum(wait_s <= 2 * MAX_WAIT_S for wait_s in place.waits) / seconds


def saturated() -> Place:
    """A place that has been busy for a while, with a line of four."""
    place = Place()
    for _ in range(4):
        place.ask("noisy")
    for number in range(20):
        place.pass_until(number * SERVICE_S)
        for _ in range(SLOTS):
            place.ask("noisy")
    return place


def ask_until_refused(place: Place, tenant: str) -> Overloaded:
    """Ask again and again."""
    for _ in range(1000):
        try:
            place.ask(tenant)
        except Overloaded as refused:
            return refused
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("most", [1.5, 2.0, 5.0])
def test_at_more_than_can_be_done_nine_tenths_of_the_best_is_done(most: float) -> None:
    best = max(goodput(load, max_wait_s=MAX_WAIT_S) for load in (0.5, 0.75, 0.9, 1.0, 1.1, 1.25))
    assert goodput(most, max_wait_s=MAX_WAIT_S) >= 0.9 * best
    assert best >= 0.9 * CAPACITY
    # What a line does that is bounded in length alone.
    assert goodput(most, max_wait_s=math.inf) < 0.5 * best


def test_a_burst_is_let_in_while_nothing_is_known_of_how_long_it_takes() -> None:
    place = Place()
    for _ in range(1000):
        place.ask()
    with pytest.raises(Overloaded, match="1000 completions run or wait, and at most 1000 may") as refused:
        place.ask()
    assert "retry_after_ms" not in refused.value.details


def test_few_that_ended_because_few_came_say_nothing_of_the_next_burst() -> None:
    place = Place()
    for hour in range(10):
        place.pass_until(hour * 3600.0)
        place.ask()
    place.pass_until(40_000.0)
    for _ in range(100):
        place.ask()


class Slow:
    """An engine that is heard of only when a test says so.

    Attributes:
        now_s: the time.
        stats: what was last heard.
    """

    def __init__(self) -> None:
        self.now_s, self.stats = 0.0, Stats()
        self.admission = Admission(max_open=10, max_wait_s=1.0, load=lambda: self.stats, now=lambda: self.now_s)

    def tell(self, now_s: float, *, running: int = 0, waiting: int = 0, num_ended: int = 0) -> None:
        """A step has ended, and some of the sequences."""
        self.now_s, self.stats = now_s, Stats(running=running, waiting=waiting)
        self.admission.measure()
        if num_ended:
            self.admission.measure(num_ended)

    def ask(self, num: int) -> None:
        """Ask for some completions, before the next step has ended."""
        with ExitStack() as asking:
            for _ in range(num):
                asking.enter_context(self.admission.admitted(1, ""))


def test_a_burst_is_let_in_however_slow_the_last_line_was() -> None:
    slow = Slow()
    slow.tell(0.0, running=1, waiting=1)
    slow.tell(100.0, running=1, waiting=1, num_ended=1)
    slow.tell(200.0, num_ended=1)
    slow.now_s = 3600.0
    slow.ask(4)
    slow.tell(3601.0, running=1, waiting=1)
    slow.ask(1)
    with pytest.raises(Overloaded, match="the wait would be more than 61 s"):
        slow.ask(4)


def test_who_came_too_late_for_one_step_and_starts_in_the_next_has_not_waited_until_somebody_ends() -> None:
    slow = Slow()
    slow.tell(0.0, running=1, waiting=5)
    slow.tell(0.1, running=6)
    slow.tell(60.0, running=5, waiting=1, num_ended=1)
    slow.tell(60.1, running=5, num_ended=1)
    slow.tell(60.2, running=5, waiting=3)
    slow.ask(4)


def test_who_would_wait_too_long_is_told_when_to_come_back() -> None:
    place = saturated()
    refused = ask_until_refused(place, "noisy")
    assert "the wait would be about 1 s, and at most 0.5 s may be waited" in refused.message
    assert int(refused.details["retry_after_ms"]) == pytest.approx(1000 / CAPACITY, abs=1)


def test_what_is_told_of_a_wait_that_nothing_shows_the_end_of_has_a_bound() -> None:
    place = saturated()
    place.now_s += 600.0  # in which nothing has ended
    refused = ask_until_refused(place, "noisy")
    assert "the wait would be more than 60 s, and at most 0.5 s may be waited" in refused.message
    assert refused.details["retry_after_ms"] == "60000"


def test_a_tenant_that_has_asked_for_little_is_let_in_beside_one_that_has_asked_for_much() -> None:
    place = saturated()
    ask_until_refused(place, "noisy")
    place.ask("quiet")
    with pytest.raises(Overloaded):
        place.ask("noisy")
    ask_until_refused(place, "quiet")


def test_who_waits_for_something_else_than_the_engine_is_before_nobody() -> None:
    place = saturated()
    with ExitStack() as elsewhere:
        elsewhere.enter_context(place.admission.admitted(100, "noisy"))
        with pytest.raises(Overloaded):
            place.ask("noisy")
        place.num_elsewhere = 100
        place.ask("noisy")


def test_what_failed_takes_no_place() -> None:
    admission = Admission(max_open=1, max_wait_s=1.0, load=Stats)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.admitted(1, ""):
            raise ZeroDivisionError
    with admission.admitted(1, ""), pytest.raises(Overloaded), admission.admitted(1, ""):
        pass
    with pytest.raises(Overloaded), admission.admitted(2, ""):
        pass


def test_it_waits_for_nobody_again_once_the_line_is_gone() -> None:
    place = saturated()
    place.pass_until(1000.0)
    for _ in range(SLOTS):
        place.ask()
    assert place.waits[-SLOTS:] == [0.0] * SLOTS


def test_it_is_idle_since_the_last_that_was_in_has_left() -> None:
    now_s = 5.0
    admission = Admission(max_open=2, max_wait_s=1.0, load=Stats, now=lambda: now_s)
    now_s = 7.0
    assert admission.idle_s == 2.0
    with admission.admitted(1, "a"):
        now_s = 8.0
        with admission.admitted(1, "b"):
            pass
        now_s = 9.0
        assert admission.idle_s == 0.0
    now_s = 9.5
    assert admission.idle_s == 0.5
