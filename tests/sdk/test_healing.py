"""Services that end are started again, as the supervisor watches them, on a clock that a test moves."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from softprompt.cli import healing
from softprompt.cli import supervisor as supervising
from softprompt.cli.healing import Service
from softprompt.cli.options import make_options
from softprompt.cli.problems import Problem
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor


class FakeChild:
    """A process that ends when a test says so."""

    has_ended = False
    error = ""

    def exit_code(self) -> int | None:
        return 3 if self.has_ended else None

    def how_it_ended(self) -> str:
        return "exit code 3"

    def last_error(self) -> str:
        return self.error

    def log_tail(self) -> str:
        return "why"


class Watched:
    """Services that have served, and what is said of them."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str, replicas: tuple[str, ...] = ()
    ) -> None:
        self.now_s, self.well = 0.0, True
        self.cannot_start: Exception | None = None
        monkeypatch.setattr(healing, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.out = io.StringIO()
        options = make_options({"data_dir": str(tmp_path)})
        self.supervisor = Supervisor(options, {}, Console(file=self.out, width=40), Stop())
        self.services = {name: Service(name, self._start, lambda: self.well) for name in (*names, *replicas)}
        self.supervisor._replicas = [self.services[name] for name in replicas]
        for service in self.services.values():
            self.supervisor._start(service)
            assert service.looks_well()
        self.supervisor._is_up = True
        self.well = False

    def _start(self) -> Any:
        if self.cannot_start is not None:
            raise self.cannot_start
        return FakeChild()

    def end(self, name: str, error: str = "") -> str:
        """End the process of a service, and have it noticed; what is said last."""
        child: Any = self.services[name].child
        child.has_ended, child.error = True, error
        self.supervisor._check_services()
        return self.out.getvalue().splitlines()[-1]

    def runs_after(self, name: str, seconds: float) -> bool:
        """Whether a service runs, so many seconds later."""
        self.now_s += seconds
        self.supervisor._check_services()
        return self.services[name].runs()

    def serve(self, name: str, seconds: float) -> None:
        """Have a service that was started again serve for so long."""
        self.well = True
        assert self.services[name].looks_well()
        self.well = False
        self.now_s += seconds


def test_what_ends_is_told_with_its_reason_in_one_line_and_started_again_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, "store", "registry")
    registry = watched.services["registry"].child
    said = watched.end("store", error="Error writing to the AOF file: No space left on device")
    assert said == (
        "store ended unexpectedly (exit code 3: Error writing to the AOF file: No space left on device); "
        "it is started again in 0.5 s"
    )
    assert not watched.runs_after("store", 0.4)
    assert watched.runs_after("store", 0.1)
    assert watched.services["registry"].child is registry


def test_pauses_grow_with_each_end_until_it_has_served_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, "gateway")
    for _ in range(2):
        for pause_s in (0.5, 1, 2, 4):
            assert watched.end("gateway").endswith(f"(exit code 3); it is started again in {pause_s:g} s")
            assert not watched.runs_after("gateway", pause_s - 0.1)
            assert watched.runs_after("gateway", 0.1)
            watched.serve("gateway", 59.0)
        watched.now_s += 1.0


@pytest.mark.parametrize("name", ["gateway", "inference"])
def test_five_ends_in_a_row_end_the_system_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    watched = Watched(monkeypatch, tmp_path, "gateway", replicas=("inference",))
    for _ in range(4):
        watched.end(name)
        assert watched.runs_after(name, 30.0)
    with pytest.raises(Problem, match=rf"{name} ended unexpectedly \(exit code 3: no luck\), 5 times") as raised:
        watched.end(name, error="no luck")
    assert raised.value.detail == "why"


@pytest.mark.parametrize("name", ["store", "registry"])
def test_what_requests_can_do_without_is_tried_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    watched = Watched(monkeypatch, tmp_path, name, replicas=("inference",))
    for pause_s in (0.5, 1, 2, 4, 8, 16, 30, 30):
        assert watched.end(name).endswith(f"it is started again in {pause_s:g} s")
        assert watched.runs_after(name, pause_s)


def test_a_start_that_fails_without_a_process_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, "gateway")
    watched.now_s += 60.0
    watched.end("gateway")
    watched.cannot_start = OSError(12, "Cannot allocate memory")
    for pause_s in (1, 2, 4):
        assert not watched.runs_after("gateway", 30.0)
        said = f"could not be started ([Errno 12] Cannot allocate memory); it is started again in {pause_s} s"
        assert watched.out.getvalue().endswith(f"{said}\n")
    with pytest.raises(Problem, match=r"could not be started .*, 5 times in a row"):
        watched.runs_after("gateway", 30.0)


def test_a_replica_is_tried_on_while_there_is_hope_for_another_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, replicas=("inference-1", "inference-2"))
    for pause_s in (0.5, 1, 2, 4, 8, 16, 30, 30):
        assert watched.end("inference-1").endswith(f"it is started again in {pause_s:g} s")
        assert watched.runs_after("inference-1", pause_s)
    for _ in range(4):
        watched.end("inference-2")
        watched.end("inference-1")
        assert watched.runs_after("inference-1", 30.0)
    watched.serve("inference-1", 1.0)
    watched.end("inference-2")  # for the fifth time, while the other serves
    assert watched.runs_after("inference-2", 30.0)
    with pytest.raises(Problem, match=r"inference-1 ended unexpectedly \(exit code 3\), \d+ times in a row"):
        watched.end("inference-1")


def test_an_end_before_all_serve_ends_the_start_with_its_reason_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, "gateway")
    watched.supervisor._is_up = False
    with pytest.raises(Problem) as raised:
        watched.end("gateway", error="port 1 needs privileges")
    assert raised.value.message == "port 1 needs privileges"
    assert raised.value.detail == "gateway ended unexpectedly (exit code 3); its log ends with\nwhy"
    with pytest.raises(Problem) as raised:
        watched.end("gateway")
    assert raised.value.message == "gateway ended unexpectedly (exit code 3); its log ends with"
    assert raised.value.detail == "why"


@pytest.mark.parametrize(("free_mib", "is_said"), [(255, True), (256, False)])
def test_little_space_is_said_in_one_line_at_the_start_and_when_a_service_ends(
    free_mib: int, is_said: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch, tmp_path, "store")
    usage = SimpleNamespace(free=free_mib * 2**20)
    monkeypatch.setattr(supervising, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    line = f"only {free_mib} MiB are free on the disk of {tmp_path}: when it is full, no adapter can be added\n"
    watched.supervisor._warn_of_little_space()
    assert watched.out.getvalue() == line * is_said
    watched.end("store")
    assert watched.out.getvalue().count(line) == 2 * is_said


def test_little_space_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    options = make_options({"data_dir": str(tmp_path / "data")})
    supervisor = Supervisor(options, {}, Console(file=out), Stop())
    monkeypatch.setattr(supervising, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0)))

    def refuse(*_: object) -> None:
        raise Problem("no store")

    monkeypatch.setattr(supervising, "EmbeddedStore", refuse)
    with pytest.raises(Problem, match="no store"):
        supervisor.run()
    assert out.getvalue().startswith("only 0 MiB are free on the disk of ")
