"""How a system starts, ends and comes back: nothing is left behind, nothing is lost."""

import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SERVICES = ("softprompt_registry", "softprompt_inference", "softprompt_gateway", "softprompt_inference.engine")
StartSystem = Callable[..., Any]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    never = threading.Event()
    for _ in range(int(timeout_s / 0.05)):
        if condition():
            return True
        never.wait(0.05)
    return False


def complete(system: Any, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{system.url}/v1/completions", json=body, timeout=60)


def test_ctrl_c_or_a_kill_ends_every_process_and_the_next_start_keeps_the_adapters(
    start_system: StartSystem, adapters: dict[str, Path], tmp_path: Path
) -> None:
    first = f"first={adapters['first']}"
    system = start_system("--prompt-adapters", first, data_dir=tmp_path)
    assert all(any(name in command for command in system.pids().values()) for name in SERVICES)
    for name in ("kept", "changed"):
        assert system.cli("adapter", "add", name, str(adapters["second"])).returncode == 0
    before = [complete(system, name).json()["choices"][0]["text"] for name in ("first", "kept")]

    in_use = start_system(data_dir=tmp_path, wait=False)
    assert in_use.process.wait(60) == 2
    assert f"the data folder {tmp_path} is in use by another softprompt" in in_use.text()

    assert system.stop() == 0
    assert wait_until(lambda: not system.pids()), system.pids()

    again = start_system("--prompt-adapters", first, f"changed={adapters['third']}", data_dir=tmp_path)
    assert "first@1, 5 virtual tokens, unchanged" in again.text()
    assert "changed@2, 5 virtual tokens, registered" in again.text()
    after = [complete(again, name) for name in ("first", "kept")]
    assert [answer.json()["choices"][0]["text"] for answer in after] == before
    assert [answer.headers["x-softprompt-adapter"] for answer in after] == ["first@1", "kept@1"]

    os.kill(again.process.pid, signal.SIGKILL)
    again.process.wait(60)
    assert wait_until(lambda: not again.pids()), again.pids()

    of_another_base = start_system("--served-model-name", "another", "--prompt-adapters", first, data_dir=tmp_path)
    assert "first@2, 5 virtual tokens, registered" in of_another_base.text()
    assert complete(of_another_base, "first").headers["x-softprompt-adapter"] == "first@2"


def test_https_is_served_also_by_a_gateway_that_was_started_again(
    start_system: StartSystem, authority: Any
) -> None:
    cert, key = map(str, authority.issue())
    system = start_system("--tls-cert", cert, "--tls-key", key)
    believes = ssl.create_default_context(cafile=authority.cert)
    url = f"https://127.0.0.1:{system.port}"
    assert f"{url}/v1" in system.text()
    assert httpx.get(f"{url}/v1/models", verify=believes, timeout=60).status_code == 200
    os.kill(system.pid_of("softprompt_gateway"), signal.SIGKILL)
    assert wait_until(lambda: "\ngateway serves again\n" in system.text()), system.text()
    assert "gateway ended unexpectedly (killed by SIGKILL" in system.text()
    assert httpx.get(f"{url}/v1/models", verify=believes, timeout=60).status_code == 200


def test_ctrl_c_while_starting_ends_every_process(start_system: StartSystem) -> None:
    system = start_system(wait=False)
    assert wait_until(lambda: any("softprompt_inference" in command for command in system.pids().values()))
    assert system.stop() == 0
    assert wait_until(lambda: not system.pids()), system.pids()
    assert "Softprompt is serving" not in system.text()


def test_a_taken_port_is_told_before_anything_starts(start_system: StartSystem) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        system = start_system("--port", str(port), wait=False)
        assert system.process.wait(60) == 2
    assert f"port {port} on 127.0.0.1 is taken" in system.text()
    assert system.text().count("\n") == 1
    assert not (system.data_dir / "logs").exists()


def test_a_model_that_is_not_there_ends_the_start_with_its_reason(start_system: StartSystem) -> None:
    system = start_system(model="/no/such/model", wait=False)
    assert system.process.wait(120) == 1
    assert "\nsoftprompt: There is no file or folder '/no/such/model'" in system.text()
    assert "\ninference ended unexpectedly (exit code 1); its log ends with\n" in system.text()
    assert wait_until(lambda: not system.pids()), system.pids()


def test_an_adapter_that_does_not_fit_ends_the_start_with_its_reason(
    start_system: StartSystem, adapters: dict[str, Path]
) -> None:
    flags = ["--prompt-adapters", f"big={adapters['second']}", "--max-prompt-adapter-token", "8"]
    system = start_system(*flags, wait=False)
    assert system.process.wait(240) == 1
    assert (
        "cannot serve the adapter 'big': the adapter has 16 virtual tokens; at most 8 are allowed" in system.text()
    )
    assert wait_until(lambda: not system.pids()), system.pids()
