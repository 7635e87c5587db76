"""What a worker and the bench say to each other: JSON lines over an inherited socket. Standard library only.

The bench sends the settings; the worker answers {"versions": …} once it has generated a token. From then on
{"load": [adapter, …]} is answered by {}, {"run": [request, …], "options": {…}} by {"outcome": …}, and what
fails by {"error": text}. The end of the socket ends the worker.
"""

import argparse
import ctypes
import json
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any, Protocol

from benchmarks.workload import Outcome, Request

_PR_SET_PDEATHSIG = 1


class Worker(Protocol):
    """One side."""

    def load(self, adapters: Sequence[str]) -> None:
        """Make the adapters in these folders ready; those loaded already are left alone."""

    def run(self, requests: Sequence[Request], **options: Any) -> Outcome:
        """Continue all prompts, greedily and past any end of sequence, by exactly as many tokens as asked."""


def main(make: Callable[..., Worker], packages: Sequence[str]) -> None:
    """Serve the socket named on the command line.

    Args:
        make: makes the worker from the settings, as keyword arguments.
        packages: whose versions are reported.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd = parser.parse_args().fd
    if sys.platform == "linux":
        # A worker that is stopped would never see that the bench has gone.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=fd) as connection, connection.makefile("rwb") as stream:
        _serve(stream, make, packages)


def _serve(stream: Any, make: Callable[..., Worker], packages: Sequence[str]) -> None:
    worker: Worker | None = None
    for line in stream:
        message = json.loads(line)
        try:
            if worker is None:
                worker = make(**message)
                worker.run([Request(prompt_ids=[1, 2, 3, 4], num_tokens=1)])
                answer: dict[str, Any] = {"versions": {name: metadata.version(name) for name in packages}}
            else:
                answer = _answer(worker, message)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        stream.write(json.dumps(answer).encode() + b"\n")
        stream.flush()


def _answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    if "load" in message:
        worker.load(message["load"])
        return {}
    requests = [Request(**request) for request in message["run"]]
    return {"outcome": asdict(worker.run(requests, **message["options"]))}
