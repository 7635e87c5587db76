"""An engine that is killed, or stopped so that it hangs (P11): its streams are told, and another replaces it."""

import base64
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from softprompt_api.rpc.probe import is_serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ENGINE = "softprompt_inference.engine"
ASKED = {"model": "first", "prompt": "Here and", "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(30)


def engine_of(system: Any) -> int:
    """Its process id."""
    [pid] = [pid for pid, command in system.pids().items() if ENGINE in command]
    return pid


def registered(http: httpx.Client, name: str, folder: Path) -> httpx.Response:
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    config = (folder / "adapter_config.json").read_text("utf-8")
    body = {"name": name, "config": config, "tensors_base64": base64.b64encode(tensors).decode()}
    return http.post("/v1/adapters", json=body)


@pytest.mark.parametrize(
    ("how", "times"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 10, marks=pytest.mark.chaos),
        pytest.param(signal.SIGSTOP, 10, marks=pytest.mark.chaos),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
def test_another_engine_takes_the_place_of_one_that_ended_or_hangs(
    shared_system: Any, adapter: Path, wait_until: Any, how: signal.Signals, times: int
) -> None:
    system = shared_system
    with httpx.Client(base_url=system.url, headers=system.make_key(), timeout=60) as http:
        before = http.post("/v1/completions", json=ASKED).json()["choices"]
        for number in range(times):
            engine, others = engine_of(system), {pid for pid, text in system.pids().items() if ENGINE not in text}
            body = ASKED | {"max_tokens": 2000, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(engine, how)
                told = [line.removeprefix("data: ") for line in lines if line]
            assert json.loads(told[-1])["error"]["code"] == "unavailable", told[-1]

            wait_until(lambda: http.get("/health/ready").status_code == 503, "the end to be noticed")
            assert not is_serving(system.inference)
            refused = http.post("/v1/completions", json=ASKED)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert "retry-after" in refused.headers
            # What needs no engine goes on.
            assert is_serving(system.registry)
            assert registered(http, f"meanwhile-{number}", adapter).status_code == 201
            assert http.get("/health/live").status_code == 200

            wait_until(lambda: http.get("/health/ready").status_code == 200, "another engine")
            assert engine_of(system) != engine
            assert {pid for pid, text in system.pids().items() if ENGINE not in text} == others
            assert http.post("/v1/completions", json=ASKED).json()["choices"] == before
            answer = http.post("/v1/completions", json=ASKED | {"model": f"meanwhile-{number}"})
            assert answer.status_code == 200, answer.text
            assert http.delete(f"/v1/adapters/meanwhile-{number}").status_code == 200
        system.wait_until_idle()
