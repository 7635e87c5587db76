"""The whole system as a user starts it: `softprompt run`, real processes, real ports."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from softprompt.cli import main
from softprompt_api.access import Scope, scope_to
from softprompt_api.inference.v1.inference_pb2 import GetLoadRequest, GetLoadResponse
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.registry.v1.registry_pb2 import CreateKeyRequest
from softprompt_api.registry.v1.registry_pb2_grpc import KeyServiceStub
from softprompt_api.rpc.channel import open_blocking_channel
from softprompt_inference.model.source import DEFAULT_MODEL

from benchmarks.ports import free_ports

_DEMO_ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.05
# Tests wait for these to pass.
_STRICT = {
    "SOFTPROMPT_GATEWAY_HEADER_TIMEOUT_S": "2",
    "SOFTPROMPT_GATEWAY_BODY_TIMEOUT_S": "3",
    "SOFTPROMPT_GATEWAY_WRITE_TIMEOUT_S": "2",
    "SOFTPROMPT_ENGINE_SILENCE_S": "8",
}


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Poll until it holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    never = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        never.wait(_POLL_S)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, what)`: see `wait_for`."""
    return wait_for


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A running `softprompt run`.

    Attributes:
        process: the parent of all services.
        mark: in the environment of every process of the system.
        output: what it printed so far.
    """

    process: "subprocess.Popen[bytes]"
    mark: str
    output: Path
    data_dir: Path
    port: int
    registry: str
    inference: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def has_started(self) -> bool:
        return self.process.poll() is not None or "Ctrl-C stops everything" in self.text()

    def pids(self) -> dict[int, str]:
        """Every living process of the system, with its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    command = (folder / "cmdline").read_text().replace("\0", " ")
                    environment = (folder / "environ").read_bytes()
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue  # it ended meanwhile, or is not ours
                # The store writes its title over its environment; the title names its socket.
                if self.mark.encode() in environment or f"{self.data_dir}/store/" in command:
                    found[int(folder.name)] = command
        return found

    def lasting_pids(self) -> set[int]:
        """Its processes without those that check grammars, which come and go."""
        return {pid for pid, command in self.pids().items() if "grammar.checker" not in command}

    def pid_of(self, module: str) -> int:
        """The process that runs `python -m module`."""
        return next(pid for pid, command in self.pids().items() if command.rstrip().endswith(f"-m {module}"))

    def make_key(self, tenant: str = "default", *scopes: Scope) -> dict[str, str]:
        """Headers with a new key of a tenant; without scopes, an admin's."""
        with open_blocking_channel(self.registry) as channel:
            request = CreateKeyRequest(tenant=tenant, scopes=map(scope_to, scopes or [Scope.ADMIN]))
            return {"authorization": f"Bearer {KeyServiceStub(channel).CreateKey(request).key}"}

    def load(self) -> GetLoadResponse:
        """What the engine does now."""
        with open_blocking_channel(self.inference) as channel:
            return InferenceServiceStub(channel).GetLoad(GetLoadRequest())

    def wait_until_idle(self) -> None:
        """Return once no sequence runs or waits, and no page is held."""

        def is_idle() -> bool:
            load = self.load()
            return (load.running, load.waiting, load.used_pages) == (0, 0, 0)

        wait_for(is_idle, "free pages")

    def stop(self) -> int:
        """Ctrl-C; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def cli(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run `softprompt …` against this system: in this process, which has imported it already."""
        with pytest.MonkeyPatch.context() as patch:
            for name, address in self._addresses().items():
                patch.setenv(name, address)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            output, errors = io.StringIO(), io.StringIO()
            with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
                main(arguments)
        code = ended.value.code
        assert isinstance(code, int), code
        return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())

    def command(self, *arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run `softprompt …` against it in a process of its own, as a shell does; it takes a second."""
        return subprocess.run(
            [sys.executable, "-m", "softprompt.cli", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **self._addresses()},
        )

    def _addresses(self) -> dict[str, str]:
        """What tells commands where it is."""
        return {
            "SOFTPROMPT_REGISTRY_ADDRESS": self.registry,
            "SOFTPROMPT_INFERENCE_ADDRESS": self.inference,
            "SOFTPROMPT_URL": self.url,
        }


StartSystem = Callable[..., System]


@contextmanager
def starting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartSystem]:
    """A function that starts systems, which end with the context."""
    systems: list[System] = []

    def start(
        *flags: str,
        data_dir: Path | None = None,
        model: str | None = None,
        wait: bool = True,
        program: str = "softprompt.cli",
        environment: Mapping[str, str] | None = None,
    ) -> System:
        folder = tmp_path_factory.mktemp("system")
        port, registry_port, inference_port = free_ports(3)
        mark = uuid.uuid4().hex
        output = folder / "output"
        data_dir = data_dir or folder / "data"
        options = {
            "--data-dir": str(data_dir),
            "--port": str(port),
            "--registry-port": str(registry_port),
            "--inference-port": str(inference_port),
            "--device": "cpu",
            "--dtype": "float32",
            "--kv-cache-gb": "0.02",
            "--max-model-len": "512",
            "--served-model-name": "tiny",
        }
        words = [word for option in options.items() for word in option]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", program, "run", model or str(tiny_model), *words, *flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), "SOFTPROMPT_TEST_MARK": mark},
            )
        registry = f"127.0.0.1:{registry_port}"
        system = System(
            process=process,
            mark=mark,
            output=output,
            data_dir=data_dir,
            port=port,
            registry=registry,
            inference=f"127.0.0.1:{inference_port}",
        )
        systems.append(system)
        if wait:
            wait_for(system.has_started, "the start", START_TIMEOUT_S)
            assert process.poll() is None, system.text()
        return system

    try:
        yield start
    finally:
        for system in systems:
            system.stop()
        for system in systems:
            wait_for(lambda system=system: not system.pids(), f"the end of {system.pids()}")


@pytest.fixture(scope="module")
def start_system(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartSystem]:
    """`start_system(*flags, data_dir=…)` starts a system; all are ended with the module's tests."""
    with starting(tiny_model, tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def find_shared_system(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Callable[..., Path]
) -> Iterator[Callable[[], System]]:
    """The shared system, started anew where a test has ended it."""
    running: list[System] = []

    def find() -> System:
        if not running or running[-1].process.poll() is not None:
            flags = ("--require-keys", "--max-model-len", "2048", "--kv-cache-gb", "0.06", "--max-num-seqs", "64")
            adapter = ("--prompt-adapters", f"first={make_adapter(1, 5)}")
            running.append(start(*flags, *adapter, environment=_STRICT))
        return running[-1]

    with starting(tiny_model, tmp_path_factory) as start:
        yield find


@pytest.fixture
def shared_system(find_shared_system: Callable[[], System]) -> System:
    """One system for all tests of faults, which leave it as it was or end it; it is strict with who is slow."""
    return find_shared_system()


@pytest.fixture(scope="session")
def small_system(
    tiny_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """One for several modules: a request costs little whatever it asks for, and all keep its adapters."""
    flags = [f"{name}={path}" for name, path in adapters.items()]
    limits = {"SOFTPROMPT_GATEWAY_MAX_CHOICES": "8"}
    with starting(tiny_model, tmp_path_factory) as start:
        yield start("--max-model-len", "320", "--prompt-adapters", *flags, environment=limits)


@pytest.fixture(scope="session")
def demo_adapters() -> dict[str, Path]:
    """The committed adapters of the default model."""
    return {name: _DEMO_ADAPTERS / name for name in ("tweet_adapter", "sms_spam", "sql_adapter")}


@pytest.fixture(scope="session")
def demo_system(
    tiny_model: Path, demo_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """The default model with the committed adapters."""
    adapters = [f"{name}={path}" for name, path in demo_adapters.items()]
    with starting(tiny_model, tmp_path_factory) as start:
        yield start("--kv-cache-gb", "0.2", "--prompt-adapters", *adapters, model=DEFAULT_MODEL)


@pytest.fixture(scope="session")
def adapters(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Three adapters of the tiny model; the first and the last have equally many virtual tokens."""
    return {"first": make_adapter(1, 5), "second": make_adapter(2, 16), "third": make_adapter(3, 5)}
