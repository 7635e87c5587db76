"""Children: their logs, and their end with or before this process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from softprompt.cli import processes
from softprompt.cli.processes import Child, readable

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def wait_for(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        os.sched_yield()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def started(command: list[str], log: Path) -> Child:
    child = Child("worker", command, log=log)
    wait_for(lambda: "up" in child.log_tail())
    return child


def test_a_child_writes_to_its_log_and_tells_its_exit_code(tmp_path: Path) -> None:
    child = Child(
        "worker", [sys.executable, "-c", "print('said'); raise SystemExit(3)"], log=tmp_path / "logs/x.log"
    )
    wait_for(lambda: child.exit_code() is not None)
    assert child.exit_code() == 3
    assert child.log_tail() == "said"


def test_the_log_of_the_start_before_is_kept(tmp_path: Path) -> None:
    for word in ("first", "second"):
        child = Child("worker", [sys.executable, "-c", f"print('{word}')"], log=tmp_path / "x.log")
        child.end(20)
        wait_for(lambda child=child: child.exit_code() is not None)
    assert (tmp_path / "x.previous.log").exists()


def test_end_asks_politely(tmp_path: Path) -> None:
    assert started(SLEEP, tmp_path / "x.log").end(20) == -signal.SIGTERM


def test_end_kills_who_does_not_listen_after_the_grace(tmp_path: Path) -> None:
    assert started(DEAF, tmp_path / "x.log").end(0.2) == -signal.SIGKILL


def test_end_kills_at_once_in_a_hurry(tmp_path: Path) -> None:
    began = time.monotonic()
    assert started(DEAF, tmp_path / "x.log").end(60, hurried=lambda: True) == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from softprompt.cli.processes import Child\n"
        f"child = Child('worker', {SLEEP!r}, log=Path({str(tmp_path / 'x.log')!r}))\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: "up" in (tmp_path / "x.log").read_text())
        parent.kill()
    wait_for(lambda: not is_running(pid))


def test_errors_are_picked_out_of_the_log_once(tmp_path: Path) -> None:
    lines = [
        '{"event": "ready", "level": "info"}',
        "not a record",
        '{"event": "call failed", "level": "error", "method": "/x", "exception": "Traceback: boom"}',
    ]
    child = Child("worker", [sys.executable, "-c", f"print({chr(10).join(lines)!r})"], log=tmp_path / "x.log")
    wait_for(lambda: child.exit_code() is not None)
    assert child.new_errors() == ["call failed method=/x\nTraceback: boom"]
    assert child.new_errors() == []


def test_a_record_reads_as_a_sentence_and_other_lines_stay() -> None:
    assert readable('{"event": "ready", "level": "info", "timestamp": "now", "port": 1}') == "ready port=1"
    assert readable('{"no event": 1}') == '{"no event": 1}'
    assert readable("{broken") == "{broken"


def ended(text: str, log: Path) -> Child:
    """A child that has written a text and ended."""
    child = Child("worker", [sys.executable, "-c", f"print({text!r}, end=''); raise SystemExit(1)"], log=log)
    wait_for(lambda: child.exit_code() is not None)
    return child


STORE = "7:M 28 Nov 2026 11:05:31.896"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            """{"event": "stopped", "level": "info"}\nsoftprompt gateway: port 1 is taken\na warning\n""",
            "port 1 is taken",
        ),
        (
            """{"event": "a", "level": "error"}\n{"event": "b", "level": "error", "x": 1, "exception": "T"}\n"""
            """{"event": "stopped", "level": "info"}\n""",
            "b x=1",
        ),
        (
            "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'x'\n\n",
            "ModuleNotF",
        ),
        (
            f"{STORE} # Error writing to the AOF file: No space left on device\n"
            f"{STORE} # Can't recover from AOF write error when the AOF fsync policy is 'always'. Exiting...\n",
            "Error writing to the AOF file: No space left on device",
        ),
        (
            f"{STORE} # WARNING Memory overcommit must be enabled!\n{STORE} * Ready to accept connections unix\n",
            "",
        ),
        (f"{STORE} # Valkey is now ready to exit, bye bye...\n", ""),
        ("timestamp=1 level=info event=stopped\n", ""),
        ("", ""),
    ],
)
def test_the_reason_of_an_end_is_found_in_the_log(text: str, error: str, tmp_path: Path) -> None:
    found = ended(text, tmp_path / "x.log").last_error()
    assert (found.startswith(error), bool(found)) == (True, bool(error))
    assert "\n" not in found


def test_how_it_ended_names_the_code_or_the_signal(tmp_path: Path) -> None:
    assert ended("", tmp_path / "x.log").how_it_ended() == "exit code 1"
    child = started(SLEEP, tmp_path / "y.log")
    os.kill(child.pid, signal.SIGKILL)
    assert child.how_it_ended() == "killed by SIGKILL"
    child = started(SLEEP, tmp_path / "z.log")
    os.kill(child.pid, signal.SIGRTMIN + 1)
    assert child.how_it_ended() == f"killed by signal {signal.SIGRTMIN + 1}"


# Numbered lines, as fast as it can, every thousandth of them an error.
# After each quarter it waits for its log to be moved.
WRITING = """
import os, sys
count, size, bound = map(int, sys.argv[1:])
for number in range(count):
    level = "info" if number % 1000 else "error"
    record = '{"event": "%d", "level": "%s", "exception": "%s"}'
    print(record % (number, level, "x" * size), flush=True)
    while (number + 1) % (count // 4) == 0 and os.fstat(1).st_size > bound:
        os.sched_yield()
"""
# Writes nothing itself, and ends with what it has started.
STARTING = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)"


@pytest.mark.parametrize(
    ("words", "count", "size"),
    [((WRITING,), 100_000, 0), ((STARTING, WRITING), 400, 100_000)],
    ids=["its own", "of what it has started"],
)
def test_a_log_is_bounded_and_no_line_and_no_error_is_lost(
    words: tuple[str, ...], count: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 50_000
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", bound)
    log, older = tmp_path / "x.log", tmp_path / "x.previous.log"
    child = Child("worker", [sys.executable, "-c", *words, *map(str, (count, size, bound))], log=log)
    kept: list[bytes] = []  # a line may end in the next file
    errors: list[str] = []
    num_moved = 0
    while child.exit_code() is None:
        child.bound_log()
        if child._is_emptied:
            child._is_emptied = False
            num_moved += 1
            kept.append(older.read_bytes())
        errors += child.new_errors()
    kept.append(log.read_bytes())
    assert child.exit_code() == 0
    assert num_moved > 3
    assert [json.loads(line)["event"] for line in b"".join(kept).splitlines()] == [
        str(number) for number in range(count)
    ]
    assert [error.split()[0] for error in errors + child.new_errors()] == [
        str(number) for number in range(0, count, 1000)
    ]


SAYING = "import time; print('more than ten bytes'); print('softprompt x: why', flush=True); time.sleep(600)"


def saying(log: Path) -> Child:
    """A child that has said a few words, and runs."""
    child = Child("worker", [sys.executable, "-c", SAYING], log=log)
    wait_for(lambda: "why" in child.log_tail())
    return child


def test_the_end_of_a_log_that_was_just_emptied_is_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    child = saying(tmp_path / "x.log")
    tail = child.log_tail()
    child.bound_log()
    assert (tmp_path / "x.log").stat().st_size == 0
    child.end(20)
    assert (child.log_tail(), child.last_error()) == (tail, "why")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "cause",
    [
        {"shutil.copyfileobj": full_disk},
        {f"{processes.__name__}._runs": lambda _: True, f"{processes.__name__}._HALT_TIMEOUT_S": 0},
    ],
    ids=["full", "waits for its disk"],
)
def test_a_log_that_cannot_be_moved_grows_on_and_is_not_tried_again_at_once(
    cause: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    child = saying(tmp_path / "x.log")
    with monkeypatch.context() as patched:
        for name, value in cause.items():
            patched.setattr(name, value)
        child.bound_log()
    child.bound_log()  # until there is as much again
    assert child.log_tail().startswith("more than ten bytes")
    assert not (tmp_path / "x.previous.log").exists()
    assert child.end(20) == -signal.SIGTERM  # it was not left halted


def test_a_log_that_somebody_empties_or_removes_is_read_on(tmp_path: Path) -> None:
    child = ended('{"event": "a", "level": "error"}\n' * 3, tmp_path / "x.log")
    assert child.new_errors() == ["a"] * 3
    (tmp_path / "x.log").write_text('{"event": "b", "level": "error"}\n')
    assert child.new_errors() == ["b"]
    (tmp_path / "x.log").unlink()
    child.bound_log()
    assert (child.new_errors(), child.log_tail()) == ([], "")
