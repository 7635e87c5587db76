"""One line per phase of a start, with a heartbeat while it runs."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.status import Status
from rich.text import Text

_HEARTBEAT_S = 5.0


class Phase:
    """A phase that runs. Set `result` to what it came to; call `tick` while waiting for it."""

    def __init__(self, name: str, console: Console, status: Status | None) -> None:
        self.name = name
        self.result = ""
        self._console = console
        self._status = status
        self._began = time.monotonic()
        self._next_beat_s = _HEARTBEAT_S

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def tick(self, doing: Callable[[], str]) -> None:
        """Say that it still runs, and what it does: each time on a terminal, every few seconds in a log."""
        if self._status is not None:
            self._status.update(Text(f"{self.name:<10} {self.elapsed_s:.0f} s  {doing()}"))
        elif self.elapsed_s >= self._next_beat_s:
            self._next_beat_s += _HEARTBEAT_S
            line = f"  {self.name:<10} … {self.elapsed_s:.0f} s  {doing()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def phase(name: str, console: Console) -> Iterator[Phase]:
    """Run a phase, then print its name, its result and its time; nothing when it fails."""
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(f"{name} …")) if console.is_terminal else None
        current = Phase(name, console, status)
        yield current
    line = f"  {name:<10} {current.result}  ({current.elapsed_s:.2f} s)"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
