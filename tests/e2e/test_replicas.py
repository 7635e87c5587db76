"""Two replicas of the default model behind one gateway: one of them is killed under load, and comes back."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NAMES = ("tweet_adapter", "sms_spam", "sql_adapter")
NUM_CLIENTS = 4


@pytest.fixture(scope="module")
def system(start_system: Callable[..., Any], demo_adapters: dict[str, Path]) -> Any:
    from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model

    flags = ("--replicas", "2", "--inference-port", "0", "--kv-cache-gb", "0.4")
    adapters = [f"{name}={demo_adapters[name]}" for name in NAMES]
    return start_system(*flags, "--prompt-adapters", *adapters, model=str(resolve_model(DEFAULT_MODEL)))


@pytest.fixture(scope="module")
def before(system: Any) -> dict[str, str]:
    """What every model answers while both replicas serve."""
    return {model: complete(system, model).json()["choices"][0]["text"] for model in (*NAMES, "tiny")}


def complete(system: Any, model: str) -> httpx.Response:
    body = {"model": model, "prompt": f"Once upon a time {model}", "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{system.url}/v1/completions", json=body, timeout=120)


def replicas(system: Any) -> list[str]:
    """The addresses of the replicas, as they are told at the start."""
    return re.findall(r"inference-\d +gRPC on (\S+),", system.text())


def fronts(system: Any) -> list[int]:
    """The processes of the inference services."""
    return [pid for pid, words in system.pids().items() if words.rstrip().endswith("-m softprompt_inference")]


def num_up(system: Any) -> int:
    """How many engines answer."""
    text = httpx.get(f"{system.url}/metrics", timeout=30).text
    return len(re.findall(r"^softprompt_engine_up\{.*\} 1\.0$", text, re.MULTILINE))


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> bool:
    never = threading.Event()
    for _ in range(int(timeout_s / 0.05)):
        if condition():
            return True
        never.wait(0.05)
    return False


def test_both_replicas_serve_and_are_named(system: Any, before: dict[str, str]) -> None:
    assert len(fronts(system)) == num_up(system) == len(set(replicas(system))) == 2
    assert "each of 2 replicas: weights" in system.text()
    assert [card["parent"] for card in httpx.get(f"{system.url}/v1/models").json()["data"]] == [None] + [
        "tiny"
    ] * 3
    resident = httpx.get(f"{system.url}/v1/resident_adapters").json()["data"]
    # Each adapter was asked for once, and is on one of them.
    assert sorted(one["model"] for one in resident) == sorted(f"{name}@1" for name in NAMES)
    assert {one["replica"] for one in resident} <= set(replicas(system))
    listed = system.cli("adapter", "ps", "--json", "--inference", ",".join(replicas(system)))
    told = {(one["replica"], one["adapter"]) for one in json.loads(listed.stdout)}
    assert told == {(one["replica"], one["model"]) for one in resident}
    assert all((system.data_dir / "logs" / f"inference-{number}.log").stat().st_size for number in (1, 2))


def test_a_replica_killed_under_load_costs_no_new_request_and_comes_back(
    system: Any, before: dict[str, str]
) -> None:
    killed, over = threading.Event(), threading.Event()
    new: list[tuple[str, httpx.Response]] = []
    interrupted: list[httpx.Response] = []

    def ask_on(models: Iterator[str]) -> None:
        for model in models:
            is_new = killed.is_set()
            answer = complete(system, model)
            if is_new:
                new.append((model, answer))
            else:
                interrupted.append(answer)
            if over.is_set():
                return

    def rotation(first: int) -> Iterator[str]:
        models = list(before)
        while True:
            yield models[first % len(models)]
            first += 1

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asking = [pool.submit(ask_on, rotation(number)) for number in range(NUM_CLIENTS)]
        try:
            assert wait_until(lambda: len(interrupted) >= 2 * NUM_CLIENTS)
            victim = fronts(system)[0]
            os.kill(victim, signal.SIGKILL)
            killed.set()
            assert wait_until(lambda: re.search(r"inference-\d serves again", system.text()) is not None)
        finally:
            over.set()
        for task in asking:
            task.result()

    assert len(new) >= 2 * NUM_CLIENTS
    assert [answer.text for _, answer in new if answer.status_code != 200] == []
    assert {(model, answer.json()["choices"][0]["text"]) for model, answer in new} == set(before.items())
    # What had begun to be generated at the killed one may have failed, and says why.
    failed = [answer.json()["error"]["code"] for answer in interrupted if answer.status_code != 200]
    assert set(failed) <= {"unavailable"}

    assert re.search(r"inference-\d ended unexpectedly \(killed by SIGKILL\); it is started again", system.text())
    assert wait_until(lambda: num_up(system) == 2)
    assert victim not in fronts(system)
    after = {model: complete(system, model).json()["choices"][0]["text"] for model in before}
    assert after == before
