"""Child processes that end with this one and write their output to a log file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from softprompt.cli import bound

_TAIL_BYTES = 16 * 1024


class Child:
    """A running process with its log.

    It has a session of its own, so Ctrl-C in the terminal reaches only this process, which then ends its children
    in order. Start it from the main thread: the kernel binds a child to the thread that made it.

    Args:
        name: for messages.
        command: program and arguments.
        log: where its output goes; what an earlier start left there is kept beside it.
        env: its whole environment; None: this process's.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", bound.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._read_to = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self.exit_code() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, grace_s: float, *, hurried: Callable[[], bool] = lambda: False) -> int:
        """Ask it to end, wait for at most `grace_s` (or until `hurried()`), then kill it. Its exit code."""
        self.ask_to_end()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not hurried():
            try:
                return self._process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        self._process.kill()
        return self._process.wait()

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of its log, made readable."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
        lines = "\n".join(readable(line) for line in text.splitlines()).splitlines()
        return "\n".join(lines[-num_lines:])

    def new_errors(self) -> list[str]:
        """Lines of level error or worse that were logged since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            *lines, _unfinished = file.read().split(b"\n")
        self._read_to += sum(len(line) + 1 for line in lines)
        records = (_record(line.decode(errors="replace")) for line in lines)
        return [_sentence(record) for record in records if record.get("level") in ("error", "critical")]


def readable(line: str) -> str:
    """A log line as a person reads it: a JSON record as its event, its values and its traceback."""
    record = _record(line)
    return _sentence(record) if record else line


def _record(line: str) -> dict[str, object]:
    if not line.startswith("{"):
        return {}
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) and "event" in record else {}


def _sentence(record: Mapping[str, object]) -> str:
    values = [f"{key}={value}" for key, value in record.items() if key not in _NOT_VALUES]
    exception = f"\n{record['exception']}" if record.get("exception") else ""
    return " ".join([str(record["event"]), *values]) + exception


_NOT_VALUES = frozenset({"event", "level", "timestamp", "exception", "logger"})
