"""A service that is killed is started again, while the others serve."""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from softprompt.registry import RegistryClient
from softprompt_api.errors import Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

START_TIMEOUT_S = 240.0
ENDINGS = {
    "store": "valkey-server",
    "registry": "softprompt_registry",
    "gateway": "softprompt_gateway",
    "inference": "softprompt_inference",
}


class Healing:
    """A system whose services are killed.

    Attributes:
        texts: what was answered before, by model.
        listed: the models that there must be: those that there were, and what was acknowledged since.
    """

    def __init__(self, system: Any, http: httpx.Client) -> None:
        self.system, self.http = system, http
        self.texts = {model: self.text_of(model) for model in ("tiny", "first")}
        self.listed = self.list()

    def text_of(self, model: str) -> str:
        """What is answered; "" where it is an error, or nobody listens."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        try:
            answer = self.http.post("/v1/completions", json=body)
        except httpx.TransportError:
            return ""
        return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""

    def list(self) -> set[str]:
        return {card["id"] for card in self.http.get("/v1/models").raise_for_status().json()["data"]}

    def serves_as_before(self) -> bool:
        return all(self.text_of(model) == text for model, text in self.texts.items())

    def pid_of(self, service: str) -> int:
        """Its process; the store has its title instead of a command line."""
        pids = self.system.pids()
        named = [pid for pid, words in pids.items() if words.rstrip().endswith(f"-m {ENDINGS[service]}")]
        titled = [pid for pid, words in pids.items() if service == "store" and ENDINGS[service] in words]
        [pid] = named or titled
        return pid


@pytest.fixture(scope="module")
def healing(small_system: Any) -> Iterator[Healing]:
    with httpx.Client(base_url=small_system.url, timeout=60) as http:
        healing = Healing(small_system, http)
        assert all(healing.texts.values())
        found = healing.listed.copy()
        yield healing
        with RegistryClient(small_system.registry) as registry:
            for name in healing.listed - found:
                registry.remove(name)


@contextlib.contextmanager
def taken(address: str, wait_until: Any) -> Iterator[None]:
    """Listen in place of a service that was killed."""
    host, _, port = address.partition(":")

    def is_bound() -> bool:
        try:
            in_the_way.bind((host, int(port)))
        except OSError:  # the one before has not quite gone
            return False
        return True

    with socket.socket() as in_the_way:
        in_the_way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_until(is_bound, "its port")
        in_the_way.listen()
        yield


def is_listed(registry: RegistryClient) -> bool:
    try:
        return bool(registry.adapters())
    except Unavailable:
        return False


@pytest.mark.parametrize("service", ENDINGS)
def test_a_killed_service_is_started_again_and_all_is_served_as_before(
    healing: Healing, service: str, adapters: dict[str, Path], wait_until: Any
) -> None:
    system = healing.system
    others = {other: healing.pid_of(other) for other in ENDINGS if other != service}
    killed, told = healing.pid_of(service), len(system.text())

    def is_told(line: str) -> bool:
        return re.search(rf"^{service} {line}$", system.text()[told:], re.MULTILINE) is not None

    def has_ended(how: str) -> Callable[[], bool]:
        return lambda: is_told(rf"ended unexpectedly \({how}\); it is started again in [\d.]+ s")

    os.kill(killed, signal.SIGKILL)
    wait_until(has_ended(r"killed by SIGKILL\b.*"), "the end to be told")
    if service == "registry":
        with taken(system.registry, wait_until):  # it cannot come back
            wait_until(has_ended(r"exit code 1: .*"), "a start that failed")
            assert healing.serves_as_before()
    if service == "store":
        assert healing.serves_as_before()
    wait_until(lambda: is_told("serves again"), "its return", START_TIMEOUT_S)
    assert {other: healing.pid_of(other) for other in others} == others
    assert healing.pid_of(service) != killed

    wait_until(healing.serves_as_before, "the same answers")
    # What needs the store and the registry works again too, and what was acknowledged is there.
    with RegistryClient(system.registry) as registry:
        wait_until(lambda: is_listed(registry), "the registry")
        registry.add(f"after-{service}", adapters["second"])
    healing.listed.add(f"after-{service}")
    assert healing.text_of(f"after-{service}")
    assert healing.list() == healing.listed
