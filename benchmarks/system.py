"""A whole system as a user starts it: `softprompt run`, and what its processes cost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from softprompt.cli.bound import bound_to_this_process

from benchmarks.http_load import stream_one
from benchmarks.ports import free_ports
from benchmarks.sides import SideFailed
from benchmarks.workload import Request

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_POLL_S = 0.02
_READY = "Ctrl-C stops everything"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# What a word of each service's command line ends with.
_SERVICES = {
    "store": ("valkey-server", "redis-server"),
    "registry": ("softprompt_registry",),
    "engine": ("softprompt_inference.engine", "benchmarks.stub.engine"),
    "front": ("softprompt_inference", "benchmarks.stub.inference"),
    "gateway": ("softprompt_gateway",),
}


class System:
    """Running services; idle, they take next to no time from others. A context manager.

    Args:
        module: what runs the system; `softprompt.cli`, or a program that takes the same arguments.
        model: Hugging Face folder.
        adapters: name to PEFT folder, registered at the start.
        folder: for data and output of this one system.
        env: its whole environment.
        flags: further words for `softprompt run`.

    Attributes:
        port: of the HTTP API.
        registry, inference: host:port of the services' gRPC.

    Raises SideFailed when it does not get ready.
    """

    def __init__(
        self,
        *,
        model: Path,
        adapters: Mapping[str, str],
        folder: Path,
        env: Mapping[str, str],
        module: str = "softprompt.cli",
        flags: Sequence[str] = (),
    ) -> None:
        self.port, registry_port, inference_port = free_ports(3)
        self.registry = f"127.0.0.1:{registry_port}"
        self.inference = f"127.0.0.1:{inference_port}"
        folder.mkdir(parents=True)
        self._output = folder / "output"
        pairs = [f"{name}={path}" for name, path in adapters.items()]
        options = {
            "--data-dir": str(folder / "data"),
            "--port": str(self.port),
            "--registry-port": str(registry_port),
            "--inference-port": str(inference_port),
            "--served-model-name": "base",
        }
        words = [*flags, *(word for option in options.items() for word in option)]
        if pairs:
            words += ["--prompt-adapters", *pairs]
        self.started_s = time.monotonic()
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                bound_to_this_process([sys.executable, "-P", "-m", module, "run", str(model), *words]),
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Wait for the panel. SideFailed when it does not come."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while _READY not in (text := self._output.read_text(encoding="utf-8", errors="replace")):
            if self._process.poll() is not None:
                raise SideFailed(f"softprompt run ended: {text.strip().splitlines()[-1:] or 'without a word'}")
            if time.monotonic() > deadline:
                raise SideFailed(f"softprompt run was not ready within {_START_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def wait_for_first_token(self, name: str, request: Request) -> float:
        """Ask until a token comes; seconds since the system's process was started."""
        deadline = self.started_s + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self.wait_until_ready()
            try:
                stream = stream_one(self.port, name, request)
            except (OSError, ValueError):  # nobody listens, or it is not ready
                time.sleep(_POLL_S)
            else:
                return stream.first_token_at - self.started_s
        raise SideFailed(f"no token within {_START_TIMEOUT_S:.0f} s")

    def cpu_s(self, modules: Sequence[str]) -> float:
        """CPU seconds that the services of these modules have used so far, user and system."""
        pids = [pid for pid, words in self._processes().items() if words[-1:] and words[-1] in modules]
        if len(pids) != len(modules):
            raise SideFailed(f"of {', '.join(modules)} there are {len(pids)} processes")
        return sum(_cpu_ticks(pid) for pid in pids) / _TICKS_PER_S

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of each service, libraries included, by its name."""
        found = {}
        for pid, words in self._processes().items():
            name = next((name for name, marks in _SERVICES.items() if _has(words, marks)), None)
            if name is not None:
                found[name] = _resident_bytes(pid)
        return found

    def stop(self) -> None:
        """Ctrl-C, and wait for the end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its children end with it
            self._process.wait()

    def _processes(self) -> dict[int, list[str]]:
        """The process and all below it, with their command lines, from the top down."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                parents[int(entry.name)] = int(fields[1])
        found, level = {}, [self._process.pid]
        while level:
            for pid in level:
                found[pid] = _command(pid)
            level = [pid for pid, parent in parents.items() if parent in level]
        return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _has(words: Sequence[str], marks: tuple[str, ...]) -> bool:
    # A store writes more into its title, behind its name.
    return any(word.split(" ")[0].endswith(marks) for word in words)


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []
