"""The inference services of one machine, each as a process that can be started again."""

import time
from collections.abc import Mapping
from pathlib import Path

from softprompt_api.rpc.probe import is_serving

from softprompt.cli.options import RunOptions
from softprompt.cli.processes import Child
from softprompt.cli.services import Addresses, command, environment

_HEALTH_TIMEOUT_S = 1.0
# What fails to start may lack memory or a file that somebody has to bring back.
_LONGEST_PAUSE_S = 60.0


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
        has_ever_served: whether it has shown that it can be started.
    """

    child: Child
    _start_at_s: float | None = None

    def __init__(self, name: str, address: str, *, log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.address = address
        self.has_served = self.has_ever_served = False
        self._pause_s = 0.0
        self._log = log
        self._env = env

    def start(self) -> Child:
        """Start its process, or a new one in place of one that has ended."""
        self.has_served = False
        self._start_at_s = None
        self.child = Child(self.name, command("inference"), log=self._log, env=self._env)
        return self.child

    def looks_well(self) -> bool:
        """Whether its health check says that it serves."""
        self.has_served = self.has_served or is_serving(self.address, _HEALTH_TIMEOUT_S)
        self.has_ever_served |= self.has_served
        return self.has_served

    def runs(self) -> bool:
        """Whether its process does, perhaps still starting."""
        return self.child.exit_code() is None

    def plan_start(self) -> float:
        """Decide when what has ended is started again: in so many seconds, more with each start that failed."""
        self._pause_s = 0.0 if self.has_served else min(max(1.0, 2 * self._pause_s), _LONGEST_PAUSE_S)
        self._start_at_s = time.monotonic() + self._pause_s
        return self._pause_s

    def is_planned(self) -> bool:
        """Whether it has ended, and will be started again."""
        return self._start_at_s is not None

    def is_due(self) -> bool:
        """Whether it is planned, and its pause is over."""
        return self._start_at_s is not None and time.monotonic() >= self._start_at_s


def make_replicas(options: RunOptions, addresses: Addresses, logs: Path) -> list[Replica]:
    """The replicas of a system, not yet started: `inference`, or `inference-1`, `inference-2` and so on."""
    replicas = []
    for index, address in enumerate(addresses.inference):
        name = f"inference-{index + 1}" if len(addresses.inference) > 1 else "inference"
        env = environment("inference", options, addresses, replica=index)
        replicas.append(Replica(name, address, log=logs / f"{name}.log", env=env))
    return replicas
