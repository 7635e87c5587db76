import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __file__ as PACKAGE
from benchmarks.sides import Side, SideFailed
from benchmarks.workload import Request

# Counts up from the first id of each prompt; a prompt of 13 fails, one of 14 ends the process.
WORKER = """
import os
from benchmarks.workers.protocol import main
from benchmarks.workload import Outcome

class Counting:
    def __init__(self, step):
        self.step, self.loaded = step, []
    def load(self, adapters):
        self.loaded += adapters
    def run(self, requests, extra=0):
        firsts = [request.prompt_ids[0] for request in requests]
        if 13 in firsts:
            raise ValueError("unlucky")
        if 14 in firsts:
            print("last words", flush=True)
            os._exit(3)
        ids = [[first + self.step * n for n in range(request.num_tokens + extra)]
               for first, request in zip(firsts, requests)]
        return Outcome(seconds=float(len(self.loaded)), token_ids=ids, token_times_s=[])

main(Counting, ["pytest"])
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "imports").mkdir()
    (tmp_path / "imports" / "benchmarks").symlink_to(Path(str(PACKAGE)).parent)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "imports")}


@pytest.fixture
def side(tmp_path: Path, env: dict[str, str]) -> Iterator[Side]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    made = Side("counting", [sys.executable, str(script)], settings={"step": 2}, env=env, logs=tmp_path / "logs")
    yield made
    made.close()


def request(first: int, num_tokens: int = 3) -> Request:
    return Request(prompt_ids=[first], num_tokens=num_tokens)


def test_a_side_reports_its_versions_and_runs_requests(side: Side) -> None:
    assert side.versions == {"pytest": pytest.__version__}
    assert side.run([request(1), request(5, 2)]).token_ids == [[1, 3, 5], [5, 7]]


def test_adapters_are_loaded_before_they_are_used(side: Side) -> None:
    side.load(["a", "b"])
    assert side.run([request(1)]).seconds == 2.0


def test_an_error_is_told_and_the_side_goes_on(side: Side) -> None:
    with pytest.raises(SideFailed, match="ValueError: unlucky"):
        side.run([request(13)])
    assert side.run([request(1, 1)]).token_ids == [[1]]


def test_other_lengths_than_asked_are_refused(side: Side) -> None:
    with pytest.raises(SideFailed, match="other numbers of tokens"):
        side.run([request(1)], extra=1)


def test_a_side_that_ends_leaves_its_last_words(side: Side) -> None:
    with pytest.raises(SideFailed, match="has ended: last words"):
        side.run([request(14)])


def test_a_side_that_cannot_start_says_why(tmp_path: Path, env: dict[str, str]) -> None:
    with pytest.raises(SideFailed, match="No module named"):
        Side("x", [sys.executable, "-m", "no_such_module"], settings={}, env=env, logs=tmp_path)


def test_a_closed_side_has_no_process(side: Side) -> None:
    pid = side._process.pid
    side.close()
    assert not Path(f"/proc/{pid}").exists()
