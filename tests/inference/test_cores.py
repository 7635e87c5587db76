"""Threads on cores of their own: OpenMP's by OpenMP, and the one that computes with them behind its start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from softprompt_inference.cores import Binding
from softprompt_inference.engine.client import EngineClient
from softprompt_inference.engine.config import EngineConfig

_GIVEN = os.sched_getaffinity(0)
_SETTINGS = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# What the engine's process does, with a product for a step; prints the cores of its threads.
_ENGINE = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from softprompt_inference.cores import Binding, run_anywhere

def cores(thread=0):
    return sorted(os.sched_getaffinity(thread))

binding = Binding()
with binding.importing(json.loads(sys.argv[1])):
    import torch
told = {"starting": cores()}
before = set(os.listdir("/proc/self/task"))
matrix = torch.ones(1000, 1000)
matrix @ matrix
told["openmp"] = [cores(int(thread)) for thread in set(os.listdir("/proc/self/task")) - before]
binding.bind()
told["computing"] = cores()
told["other"] = ThreadPoolExecutor(1, initializer=run_anywhere).submit(cores).result()
print(json.dumps(told))
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of this process, without OpenMP's settings; changes are undone."""
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    monkeypatch.setattr("os.environ", environment)
    return environment


def _siblings(core: int) -> str:
    """The threads of a processor's core, as the system lists them; "" where it does not."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    return path.read_text() if path.exists() else ""


# Threads of one core, or of cores that the system does not tell apart, cannot be kept from each other.
on_several_cores = pytest.mark.skipif(
    len({_siblings(core) for core in _GIVEN}) < 2, reason="there is one core, as far as the system tells"
)


def _told(environment: dict[str, str], num_threads: int | None) -> Any:
    words = [sys.executable, "-c", _ENGINE, json.dumps(num_threads)]
    done = subprocess.run(words, env=environment, capture_output=True, check=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


@on_several_cores
def test_no_two_threads_that_compute_have_a_core_in_common(environment: dict[str, str]) -> None:
    told = _told(environment, None)
    assert told["starting"] == told["other"] == sorted(_GIVEN)
    computing = [told["computing"], *told["openmp"]]
    assert len(computing) > 1
    assert sum(map(len, computing)) == len(set().union(*computing)), computing


@on_several_cores
async def test_an_engine_with_a_thread_for_each_core_stays_on_its_own(tiny_model: Path) -> None:
    config = EngineConfig(
        model_path=str(tiny_model), device="cpu", kv_cache_bytes=2**24, num_threads=len(_GIVEN), max_step_tokens=32
    )
    client = await EngineClient.start(config, str)
    bound = os.sched_getaffinity(client.pid)
    await client.stop()
    assert bound < _GIVEN


def test_threads_that_are_not_as_many_as_cores_run_where_they_may(environment: dict[str, str]) -> None:
    told = _told(environment, len(_GIVEN) + 1)
    assert all(cores == sorted(_GIVEN) for cores in (told["computing"], told["other"], *told["openmp"])), told


@pytest.mark.parametrize(
    ("settings", "num_threads", "is_bound"),
    [
        ({}, None, True),
        ({}, len(_GIVEN), True),
        ({}, len(_GIVEN) + 1, False),
        ({"OMP_NUM_THREADS": str(len(_GIVEN))}, None, True),
        ({"OMP_NUM_THREADS": str(len(_GIVEN) + 1)}, None, False),
        ({"OMP_NUM_THREADS": "4,2"}, None, False),
        ({"OMP_NUM_THREADS": "4,2"}, len(_GIVEN), True),
        ({"OMP_PROC_BIND": "false"}, None, False),
        ({"OMP_PLACES": "sockets"}, None, False),
    ],
)
def test_openmp_is_asked_to_bind_as_many_threads_as_cores_unless_it_was_told_otherwise(
    environment: dict[str, str], settings: dict[str, str], num_threads: int | None, is_bound: bool
) -> None:
    environment.update(settings)
    with Binding().importing(num_threads):
        pass
    assert {name: environment[name] for name in _SETTINGS if name in environment} == {
        **settings,
        **({"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if is_bound else {}),
    }


def test_where_cores_cannot_be_chosen_the_system_chooses(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_process: int, _cores: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    binding = Binding()
    with binding.importing(None):
        pass
    binding.bind()
    assert os.sched_getaffinity(0) == _GIVEN
