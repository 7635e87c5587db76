"""Lines that say what runs, how far it is and how long it will still take."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO


class Progress:
    """Counts turns: one timed job of one side.

    Args:
        expected: turns of each case, as its module estimates them; a case that ends settles its own account.
        out: where lines go.
        clock: seconds, rising.
    """

    def __init__(
        self, expected: Mapping[str, int], out: TextIO = sys.stdout, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected = dict(expected)
        self._out = out
        self._clock = clock
        self._start = clock()
        self._closed = 0
        self._in_case = 0
        self._case = ""

    def begin(self, case: str) -> None:
        """A case begins."""
        self._case, self._in_case = case, 0

    def end(self) -> None:
        """The case ends, with however many turns it took."""
        self._closed += self._expected.get(self._case, 0)
        self._in_case = 0

    def turn(self, text: str) -> None:
        """One turn is done."""
        self._in_case += 1
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line that is no turn."""
        elapsed_s = self._clock() - self._start
        line = f"[{_clock_text(elapsed_s)}, {self._remaining(elapsed_s)}] {self._case:<3} {text}"
        print(line, file=self._out, flush=True)

    def _remaining(self, elapsed_s: float) -> str:
        total = sum(self._expected.values())
        done = self._closed + min(self._in_case, self._expected.get(self._case, 0))
        if not done:
            return "time left unknown"
        return f"about {_clock_text(elapsed_s / done * (total - done))} left"


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
