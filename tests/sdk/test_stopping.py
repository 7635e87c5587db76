"""`softprompt run` is asked to stop: by which signals, and with whom to tell."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from softprompt.cli.stopping import Stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give this process its handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_a_second_one_to_hurry(number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = Stop()
    stop.listen()
    signal.raise_signal(number)
    assert (stop.asked(), stop.hurried()) == (True, False)
    signal.raise_signal(number)
    assert stop.hurried()


def test_a_hang_up_that_nohup_has_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    stop.listen()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.asked()
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked()


# Ctrl-C on `softprompt run | tee log` ends tee too.
STOP_WITH_NOBODY_READING = """
import signal, sys
from pathlib import Path
from rich.console import Console
from softprompt.cli.options import make_options
from softprompt.cli.processes import Child
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor

folder = Path(sys.argv[1])
stop = Stop()
stop.listen()
supervisor = Supervisor(make_options({"data_dir": str(folder)}), Console(), stop)
child = Child("worker", ["sleep", "600"], log=folder / "worker.log")
supervisor._children.append(child)
signal.raise_signal(signal.SIGINT)
supervisor._end_all()
print(child.exit_code(), file=sys.stderr)
"""


def test_children_are_ended_in_order_though_nobody_reads_what_is_said(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", STOP_WITH_NOBODY_READING, str(tmp_path)]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writing)
    assert done.stderr == f"{-signal.SIGTERM}\n"
    assert done.returncode == 0
