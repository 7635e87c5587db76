from io import StringIO

from benchmarks.progress import Progress


def test_lines_say_what_is_done_and_what_is_left() -> None:
    now, out = [0.0], StringIO()
    progress = Progress({"B1": 4, "B2": 6}, out=out, clock=lambda: now[0])
    progress.say("starting")
    progress.begin("B1")
    now[0] = 60.0
    progress.turn("one")
    progress.end()
    progress.begin("B2")
    progress.say("next")
    assert out.getvalue().splitlines() == [
        "[0:00, time left unknown]     starting",
        "[1:00, about 9:00 left] B1  one",
        # A case that ended has taken all its turns.
        "[1:00, about 1:30 left] B2  next",
    ]


def test_more_turns_than_expected_leave_no_time_below_zero() -> None:
    out = StringIO()
    progress = Progress({"B1": 1}, out=out, clock=lambda: 0.0)
    progress.begin("B1")
    progress.turn("one")
    progress.turn("two")
    assert out.getvalue().splitlines()[-1] == "[0:00, about 0:00 left] B1  two"
