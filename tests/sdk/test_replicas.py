"""The inference processes of one machine."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from softprompt.cli import replicas as replicas_module
from softprompt.cli.options import make_options
from softprompt.cli.problems import Problem
from softprompt.cli.replicas import make_replicas
from softprompt.cli.services import Addresses
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor


@pytest.mark.parametrize(("count", "names"), [(1, ["inference"]), (2, ["inference-1", "inference-2"])])
def test_each_has_a_name_a_log_and_an_address(count: int, names: list[str], tmp_path: Path) -> None:
    places = tuple(f"127.0.0.1:{port}" for port in range(1, count + 1))
    addresses = Addresses(redis_url="", registry="r:1", inference=places, gateway_host="h", gateway_port=1)
    replicas = make_replicas(make_options({"replicas": count}), addresses, tmp_path)
    assert [replica.name for replica in replicas] == names
    assert [replica.address for replica in replicas] == list(places)


class FakeChild:
    """A process that ends when a test says so."""

    def __init__(self, name: str, _command: object, **_: object) -> None:
        self.name = name
        self.code: int | None = None

    def exit_code(self) -> int | None:
        return self.code

    def log_tail(self) -> str:
        return "why"


class Pair:
    """Two replicas that have served, as the supervisor watches them, on a clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.now_s, self.well = 0.0, True
        monkeypatch.setattr(replicas_module, "Child", FakeChild)
        monkeypatch.setattr(replicas_module, "is_serving", lambda *_: self.well)
        monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        options = make_options({"replicas": 2, "data_dir": str(tmp_path)})
        places = ("127.0.0.1:1", "127.0.0.1:2")
        addresses = Addresses(redis_url="", registry="r:1", inference=places, gateway_host="h", gateway_port=1)
        self.said = io.StringIO()
        self.supervisor = Supervisor(options, {}, Console(file=self.said, width=200), Stop())
        self.replicas = make_replicas(options, addresses, tmp_path)
        self.supervisor._replicas += self.replicas
        self.supervisor._children += [replica.start() for replica in self.replicas]
        assert all(replica.looks_well() for replica in self.replicas)
        self.well = False

    def end(self, index: int) -> None:
        """End the process of a replica, and have it noticed."""
        child: Any = self.replicas[index].child
        child.code = 3
        self.supervisor._check_children()

    def is_running_after(self, index: int, seconds: float) -> bool:
        """Whether a replica runs, so many seconds later."""
        self.now_s += seconds
        self.supervisor._check_children()
        assert self.supervisor._children[index] is self.replicas[index].child
        return self.replicas[index].runs()


def test_a_replica_that_fails_to_start_again_is_tried_on_with_growing_pauses_while_the_other_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair = Pair(monkeypatch, tmp_path)
    pair.end(0)
    assert pair.is_running_after(0, 0.0), "what has served is started at once"
    for pause_s in (1, 2, 4, 8, 16, 32, 60, 60):
        pair.end(0)
        assert not pair.is_running_after(0, pause_s - 0.5)
        assert pair.is_running_after(0, 0.5)
        assert pair.said.getvalue().endswith(f"(exit code 3); it is started again in {pause_s} s\n")
    pair.well = True
    assert pair.replicas[0].looks_well()
    pair.end(0)
    assert pair.is_running_after(0, 0.0)
    pair.well = False
    pair.end(0)
    assert pair.is_running_after(0, 1.0), "pauses begin anew"


def test_all_end_when_no_replica_runs_any_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = Pair(monkeypatch, tmp_path)
    pair.end(0)
    pair.end(0)
    pair.end(1)  # it has served until now, and so it is started again
    assert pair.is_running_after(1, 0.0)
    with pytest.raises(Problem, match=r"inference-2 ended unexpectedly \(exit code 3\)") as raised:
        pair.end(1)
    assert raised.value.detail == "why"
