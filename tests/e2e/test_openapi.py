"""A running system does what its OpenAPI document says, and others notice nothing while it is tried."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
NUM_CASES = 10_000


def schemathesis(system: Any, adapter: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Run schemathesis against a system; its report."""
    report = folder / "report.json"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = (adapter / "adapter_model.safetensors").read_bytes()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "--no-color"),
            *("run", f"{system.url}/openapi.json", "--report-json-path", str(report), *flags),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": str(HOOKS),
            "FUZZED_CONFIG": json.dumps(config),
            "FUZZED_TENSORS": base64.b64encode(tensors).decode(),
            "FUZZED_SHA256": hashlib.sha256(tensors).hexdigest(),
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout
    told: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return told


@contextmanager
def neighbours(system: Any) -> Iterator[dict[str, set[str]]]:
    """What greedy requests of others are answered all the while, by model; they stop with the context."""
    answers: dict[str, set[str]] = {"tiny": set(), "third@1": set()}
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=system.url, timeout=120) as http:
            while not over.is_set():
                for model, texts in answers.items():
                    body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 16, "temperature": 0}
                    answer = http.post("/v1/completions", json=body)
                    texts.add(answer.json()["choices"][0]["text"] if answer.is_success else answer.text)

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        try:
            yield answers
        finally:
            over.set()
            asking.result()


def check_unharmed(system: Any, pids: set[int], answers: dict[str, set[str]]) -> None:
    """The same processes serve, nobody's answers changed, and nothing runs on."""
    assert [len(texts) for texts in answers.values()] == [1, 1], answers
    assert system.lasting_pids() == pids
    assert httpx.get(f"{system.url}/health").json()["status"] == "ok"
    listed = {card["id"] for card in httpx.get(f"{system.url}/v1/models").json()["data"]}
    assert {"tiny", "first", "second", "third"} <= listed
    metrics = httpx.get(f"{system.url}/metrics").text
    for name in ("running", "waiting"):
        assert re.search(rf"^softprompt_engine_{name}\{{.*\}} 0\.0$", metrics, re.MULTILINE), name


def test_a_running_system_does_what_its_document_says(
    small_system: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    pids = small_system.lasting_pids()
    with neighbours(small_system) as answers:
        flags = ("--phases", "fuzzing,stateful", "--max-examples", "8")
        report = schemathesis(small_system, make_adapter(61, 4), tmp_path, *flags)
    check_unharmed(small_system, pids, answers)
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert report["test_cases"]["generated"] >= 150


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_ten_thousand_cases_find_nothing(
    small_system: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    pids = small_system.lasting_pids()
    with neighbours(small_system) as answers:
        report = schemathesis(small_system, make_adapter(61, 4), tmp_path, "--max-examples", "450")
    check_unharmed(small_system, pids, answers)
    assert report["test_cases"]["generated"] >= NUM_CASES
