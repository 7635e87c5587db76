"""Child processes that end with this one and write their output to a log file."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from softprompt.cli.bound import bound_to_this_process

# A log that has grown so large takes the place of the one before.
MAX_LOG_BYTES = 64 * 2**20
_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 20
_HALT_TIMEOUT_S = 1.0
# How a service that ends by itself says why: `softprompt gateway: …`.
_LAST_WORDS = re.compile(r"softprompt \w+: (.+)")
# The store's lines: process and role, time, level, text. Warnings, and what follows from an error, are no reason.
_OF_STORE = re.compile(r"\d+:[A-Z] [\w :.]+ (?P<level>[.*#-]) (?P<text>.*)")
_NO_REASON = re.compile("WARNING|Can't recover from AOF|.*bye bye")


class Child:
    """A running process with its log.

    It has a session of its own, so Ctrl-C in the terminal reaches only this process, which then ends its children
    in order. Start it from the main thread: the kernel binds a child to the thread that made it.

    Args:
        name: for messages.
        command: program and arguments.
        log: where its output goes; what an earlier start left there is kept beside it, as `.previous.log`.
        env: its whole environment; None: this process's.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._previous_log = log.with_suffix(".previous.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(self._previous_log)
        # Appended to, so that it goes on at the beginning of what was emptied.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                bound_to_this_process(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._read_to = 0
        self._unfinished = b""
        self._errors: list[str] = []
        self._is_emptied = False
        self._empty_beyond = MAX_LOG_BYTES

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def how_it_ended(self) -> str:
        """Its exit code, or the signal that killed it; it has ended."""
        code = self._process.wait()
        names = {number.value: number.name for number in signal.Signals}  # most real-time signals have none
        return f"exit code {code}" if code >= 0 else f"killed by {names.get(-code, f'signal {-code}')}"

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

    def log_tail(self, num_lines: int = _TAIL_LINES) -> str:
        """The last lines of its log, made readable."""
        lines = "\n".join(map(readable, self._last_lines())).splitlines()
        return "\n".join(lines[-num_lines:])

    def last_error(self) -> str:
        """Why it ended, as far as the end of its log tells, in one line; otherwise ""."""
        lines = [line for line in self._last_lines()[-_TAIL_LINES:] if line.strip()]
        last_words = [found[1] for line in lines if (found := _LAST_WORDS.match(line))]
        if last_words:
            return last_words[-1]
        if lines and _is_plain(lines[-1]):  # as a traceback ends
            return lines[-1].strip()
        return next(filter(None, map(_error, reversed(lines))), "")

    def new_errors(self) -> list[str]:
        """Lines of level error or worse that were logged since the last call."""
        self._read_on()
        errors, self._errors = self._errors, []
        return errors

    def bound_log(self) -> None:
        """Keep the log small: when it has grown large, what it has becomes the log before, and no line is lost.

        The process holds the file open, so the file stays and is emptied.
        """
        size = _size(self.log)
        if size <= self._empty_beyond or self.exit_code() is not None:
            return
        try:
            self._move_log()
            self._empty_beyond = MAX_LOG_BYTES
        except OSError:  # as when the disk is full, or makes a process wait
            self._previous_log.unlink(missing_ok=True)
            self._empty_beyond = size + MAX_LOG_BYTES

    def _move_log(self) -> None:
        with self.log.open("rb") as log, self._previous_log.open("wb") as previous:
            shutil.copyfileobj(log, previous)
            with _halted(self.pid):
                # What was written meanwhile. Afterwards nothing is, until the file is empty.
                shutil.copyfileobj(log, previous)
                previous.flush()
                self._read_on()
                os.truncate(self.log, 0)
        self._read_to = 0
        self._is_emptied = True

    def _read_on(self) -> None:
        """Take the errors out of what was logged since the last time."""
        if _size(self.log) < self._read_to:  # somebody has emptied it
            self._read_to = 0
        written = _read(self.log, self._read_to)
        self._read_to += len(written)
        *lines, self._unfinished = (self._unfinished + written).split(b"\n")
        records = (_record(line.decode(errors="replace")) for line in lines)
        self._errors += [_sentence(record) for record in records if _is_error(record)]

    def _last_lines(self) -> list[str]:
        logs = [self._previous_log, self.log] if self._is_emptied else [self.log]
        end = b"".join(_read(log, max(0, _size(log) - _TAIL_BYTES)) for log in logs)
        return end[-_TAIL_BYTES:].decode(errors="replace").splitlines()


@contextlib.contextmanager
def _halted(group: int) -> Iterator[None]:
    """Halt a process of ours and what it has started; TimeoutError where one of them does not in time."""
    os.killpg(group, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + _HALT_TIMEOUT_S
        while any(map(_runs, _members(group))):
            if time.monotonic() > deadline:
                raise TimeoutError
            os.sched_yield()
        yield
    finally:
        os.killpg(group, signal.SIGCONT)


def _members(group: int) -> Iterator[str]:
    """The processes of a group, as folders that the kernel tells of them in."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            if os.getpgid(int(name)) == group:
                yield f"/proc/{name}"


def _runs(process: str) -> bool:
    """Whether a thread of a process is neither halted nor at its end: it may be writing."""
    try:
        return any(
            _state(f"{process}/task/{thread}/stat") not in b"TtZX" for thread in os.listdir(f"{process}/task")
        )
    except (FileNotFoundError, ProcessLookupError):  # one has ended meanwhile
        return True


def _state(thread: str) -> bytes:
    """One letter, which the kernel tells behind a thread's name."""
    with open(thread, "rb") as file:
        return file.read().rpartition(b") ")[2][:1]


def _size(path: Path) -> int:
    """The size of a file; 0 where somebody has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, start: int) -> bytes:
    """A file from a position on; nothing where somebody has removed it."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


def _is_plain(line: str) -> bool:
    """Whether no logger has written it."""
    return not (_record(line) or _OF_STORE.match(line) or " level=" in line)


def _error(line: str) -> str:
    """What a line says, if a logger has written it as an error; otherwise ""."""
    if found := _OF_STORE.match(line):
        return found["text"] if found["level"] == "#" and not _NO_REASON.match(found["text"]) else ""
    record = _record(line)
    return _sentence(record).splitlines()[0] if _is_error(record) else ""


def _is_error(record: Mapping[str, object]) -> bool:
    return record.get("level") in ("error", "critical")


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
