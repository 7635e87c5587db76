"""The end of a process: its status and its words are those of `sys.exit`, and nothing else is waited for."""

import os
import re
import subprocess
import sys

import pytest

MAIN = """
import atexit, sys, threading
from softprompt_api.ending import run_to_end

def main():
    atexit.register(print, "taken apart")
    threading.Thread(target=threading.Event().wait).start()
    print("said", end="")
    {body}

run_to_end(main)
"""


@pytest.mark.parametrize(
    ("body", "status", "errors"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('cannot be')", 1, "cannot be\n"),
    ],
)
def test_a_process_ends_at_once_with_its_status_and_all_that_it_said(body: str, status: int, errors: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MAIN.format(body=body)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "said", errors)


def test_a_failure_is_told_as_ever() -> None:
    code = "from softprompt_api.ending import run_to_end\nrun_to_end(lambda: 1 // 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert re.search("^ZeroDivisionError: .* by zero\n$", ended.stderr, re.MULTILINE)


def test_output_that_nobody_reads_any_more_is_no_failure() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody:
        ended = subprocess.run(
            [sys.executable, "-c", MAIN.format(body="return 0")],
            stdout=nobody,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
    assert (ended.returncode, ended.stderr) == (0, b"")
