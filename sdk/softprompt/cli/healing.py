"""A service whose process is started again when it has ended."""

import time
from collections.abc import Callable

from softprompt.cli.processes import Child

_FIRST_PAUSE_S = 0.5
# What fails to start may lack memory or a file that somebody has to bring back.
_LONGEST_PAUSE_S = 30.0
# Who has served for so long ended by a mischance, and not because it cannot run.
_RUNS_WELL_S = 60.0
# After so many ends in a row without that, there is no hope.
_MOST_ENDS = 5


class Service:
    """One service of a system: its process, and when another takes its place.

    Args:
        name: for messages.
        start: starts a process; the one before has ended.
        is_serving: whether the process that runs serves.

    Attributes:
        child: its process, once it was started.
        has_served: whether it has, since its last start.
        num_ends: how often it has ended in a row without having served for a minute.
    """

    child: Child
    has_served = False
    _well_at_s = 0.0
    _start_at_s: float | None = None
    _next_pause_s = _FIRST_PAUSE_S
    num_ends = 0

    def __init__(self, name: str, start: Callable[[], Child], is_serving: Callable[[], bool]) -> None:
        self.name = name
        self._start = start
        self._is_serving = is_serving

    def start(self) -> None:
        """Start its process, or a new one in place of one that has ended."""
        self.child = self._start()
        self.has_served = False
        self._start_at_s = None

    def looks_well(self) -> bool:
        """Whether it has served since its last start; asked until it has."""
        if not self.has_served and self._is_serving():
            self.has_served = True
            self._well_at_s = time.monotonic() + _RUNS_WELL_S
        return self.has_served

    def runs(self) -> bool:
        """Whether its process does, perhaps still starting."""
        return self.child.exit_code() is None

    def plan_start(self) -> float:
        """Decide when what has ended is started again: in so many seconds, more with each end in a row."""
        if self.has_served and time.monotonic() >= self._well_at_s:
            self._next_pause_s, self.num_ends = _FIRST_PAUSE_S, 0
        pause_s = self._next_pause_s
        self._next_pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self.num_ends += 1
        self._start_at_s = time.monotonic() + pause_s
        # A start that fails without a process is an end too, and no second time that of a process that served.
        self.has_served = False
        return pause_s

    def is_hopeless(self) -> bool:
        """Whether it does not serve, and has ended too often in a row to be started again."""
        return not self.has_served and self.num_ends >= _MOST_ENDS

    def is_planned(self) -> bool:
        """Whether it has ended, and will be started again."""
        return self._start_at_s is not None

    def is_due(self) -> bool:
        """Whether it is planned, and its pause is over."""
        return self._start_at_s is not None and time.monotonic() >= self._start_at_s
