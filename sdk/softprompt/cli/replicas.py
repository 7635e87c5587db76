"""The inference services of one machine, each as a process that can be started again."""

from functools import partial
from pathlib import Path

from softprompt_api.rpc.probe import is_serving

from softprompt.cli.healing import Service
from softprompt.cli.options import RunOptions
from softprompt.cli.processes import Child
from softprompt.cli.services import Addresses, command, environment

_HEALTH_TIMEOUT_S = 1.0


def make_replicas(options: RunOptions, addresses: Addresses, logs: Path) -> list[Service]:
    """The replicas of a system, not yet started: `inference`, or `inference-1`, `inference-2` and so on."""
    replicas = []
    for index, address in enumerate(addresses.inference):
        name = f"inference-{index + 1}" if len(addresses.inference) > 1 else "inference"
        env = environment("inference", options, addresses, replica=index)
        start = partial(Child, name, command("inference"), log=logs / f"{name}.log", env=env)
        replicas.append(Service(name, start, partial(is_serving, address, _HEALTH_TIMEOUT_S)))
    return replicas
