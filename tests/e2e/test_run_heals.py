"""A service that is killed is started again, while the others serve (one system for all of them)."""

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

START_TIMEOUT_S = 240.0
ENDINGS = {
    "store": "valkey-server",
    "registry": "softprompt_registry",
    "gateway": "softprompt_gateway",
    "inference": "softprompt_inference",
}


@pytest.fixture(scope="module")
def system(start_system: Callable[..., Any], adapters: dict[str, Path]) -> Any:
    return start_system("--prompt-adapters", f"first={adapters['first']}")


def complete(system: Any, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{system.url}/v1/completions", json=body, timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def is_answered(system: Any, model: str) -> bool:
    try:
        return complete(system, model).status_code == 200
    except httpx.TransportError:  # nobody listens
        return False


def pid_of(system: Any, service: str) -> int:
    """The process of a service; the store has its title instead of a command line."""
    named = [pid for pid, words in system.pids().items() if words.rstrip().endswith(f"-m {ENDINGS[service]}")]
    titled = [pid for pid, words in system.pids().items() if service == "store" and ENDINGS[service] in words]
    [pid] = named or titled
    return pid


def is_bound(listener: socket.socket, host: str, port: int) -> bool:
    try:
        listener.bind((host, port))
    except OSError:  # the one before has not quite gone
        return False
    return True


def test_what_is_known_is_served_while_the_registry_cannot_come_back(system: Any, wait_until: Any) -> None:
    before = {model: text_of(complete(system, model)) for model in ("tiny", "first")}
    host, _, port = system.registry.partition(":")
    told = len(system.text())
    os.kill(pid_of(system, "registry"), signal.SIGKILL)
    with socket.socket() as in_the_way:
        in_the_way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_until(lambda: is_bound(in_the_way, host, int(port)), "its port")
        in_the_way.listen()
        assert {model: text_of(complete(system, model)) for model in before} == before
        failed = r"^registry ended unexpectedly \(exit code 1: .*\); it is started again in 1 s$"
        wait_until(lambda: re.search(failed, system.text()[told:], re.MULTILINE), "a start that failed")
    wait_until(lambda: "\nregistry serves again\n" in system.text()[told:], "its return", START_TIMEOUT_S)
    wait_until(lambda: system.cli("adapter", "show", "first").returncode == 0, "the registry")


@pytest.mark.parametrize("service", ENDINGS)
def test_a_killed_service_is_started_again_and_all_is_served_as_before(
    system: Any, service: str, adapters: dict[str, Path], wait_until: Any
) -> None:
    before = {model: text_of(complete(system, model)) for model in ("tiny", "first")}
    others = {other: pid_of(system, other) for other in ENDINGS if other != service}
    killed = pid_of(system, service)
    told = len(system.text())
    os.kill(killed, signal.SIGKILL)

    ended = rf"^{service} ended unexpectedly \(killed by SIGKILL\b.*\); it is started again in [\d.]+ s$"
    wait_until(lambda: re.search(ended, system.text()[told:], re.MULTILINE), "the end to be told")
    if service in ("store", "registry"):
        assert text_of(complete(system, "tiny")) == before["tiny"]
    wait_until(lambda: f"\n{service} serves again\n" in system.text()[told:], "its return", START_TIMEOUT_S)
    assert {other: pid_of(system, other) for other in others} == others
    assert pid_of(system, service) != killed

    for model in before:
        wait_until(lambda model=model: is_answered(system, model), f"an answer of {model}")
    assert {model: text_of(complete(system, model)) for model in before} == before
    # What needs the store and the registry works again too.
    wait_until(lambda: system.cli("adapter", "ls").returncode == 0, "the registry")
    added = system.cli("adapter", "add", f"after-{service}", str(adapters["second"]))
    assert added.returncode == 0, added.stderr
    assert complete(system, f"after-{service}").status_code == 200


def test_what_was_acknowledged_before_and_between_the_kills_is_there(system: Any) -> None:
    listed = httpx.get(f"{system.url}/v1/models", timeout=60).json()["data"]
    assert {card["id"] for card in listed} == {"tiny", "first", *(f"after-{service}" for service in ENDINGS)}
