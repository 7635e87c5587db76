"""The inference services of one machine, each as a process that can be started again."""

from collections.abc import Mapping
from pathlib import Path

from softprompt_api.rpc.probe import is_serving

from softprompt.cli.options import RunOptions
from softprompt.cli.processes import Child
from softprompt.cli.services import Addresses, command, environment

_HEALTH_TIMEOUT_S = 1.0


class Replica:
    """One of them.

    Args:
        name: for messages and its log.
        address: where it will listen.
        log: where its output goes.
        env: its whole environment.

    Attributes:
        child: its process, once it was started.
        has_served: whether it has, since its last start.
    """

    child: Child

    def __init__(self, name: str, address: str, *, log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.address = address
        self.has_served = False
        self._log = log
        self._env = env

    def start(self) -> Child:
        """Start its process, or a new one in place of one that has ended."""
        self.has_served = False
        self.child = Child(self.name, command("inference"), log=self._log, env=self._env)
        return self.child

    def looks_well(self) -> bool:
        """Whether its health check says that it serves."""
        self.has_served = self.has_served or is_serving(self.address, _HEALTH_TIMEOUT_S)
        return self.has_served


def make_replicas(options: RunOptions, addresses: Addresses, logs: Path) -> list[Replica]:
    """The replicas of a system, not yet started: `inference`, or `inference-1`, `inference-2` and so on."""
    replicas = []
    for index, address in enumerate(addresses.inference):
        name = f"inference-{index + 1}" if len(addresses.inference) > 1 else "inference"
        env = environment("inference", options, addresses, replica=index)
        replicas.append(Replica(name, address, log=logs / f"{name}.log", env=env))
    return replicas
