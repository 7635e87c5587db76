"""Children: their logs, and their end with or before this process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
