"""Each side in a process of its own, which is stopped (SIGSTOP) while another has its turn.

A worker is `python -m benchmarks.workers.NAME --fd N`; see `benchmarks.workers.protocol` for what is said.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workload import Outcome, Request

_START_TIMEOUT_S = 1800.0
_TURN_TIMEOUT_S = 3600.0
_END_TIMEOUT_S = 5.0
_TAIL_BYTES = 4096


class SideFailed(Exception):
    """A side cannot be measured; the message says why."""


class Side:
    """A worker process, running only inside its own calls.

    Args:
        name: for messages and the log's name.
        command: interpreter, and the worker's module.
        settings: what the worker is made with.
        env: its whole environment.
        logs: folder for its output.

    Attributes:
        versions: of its packages, as it reported them.
        first_token_s: from the process's start to its first generated token.

    Raises SideFailed when it does not get ready.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, settings: Mapping[str, Any], env: Mapping[str, str], logs: Path
    ) -> None:
        self.name = name
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{name.replace(' ', '_').replace(',', '')}.log"
        start = time.monotonic()
        self._connection, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                env=dict(env),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._reader = self._connection.makefile("rb")
        try:
            self._send(settings)
            ready = self._receive(_START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.first_token_s = time.monotonic() - start
        self.versions: dict[str, str] = ready["versions"]
        self._signal(signal.SIGSTOP)

    def load(self, adapters: Sequence[str]) -> None:
        """Make adapters ready; not timed."""
        self._call({"load": list(adapters)})

    def run(self, requests: Sequence[Request], **options: Any) -> Outcome:
        """Give all requests at once and wait for the last token. SideFailed unless every length is as asked."""
        answer = self._call({"run": [asdict(request) for request in requests], "options": options})
        outcome = Outcome(**answer["outcome"])
        if [len(ids) for ids in outcome.token_ids] != [request.num_tokens for request in requests]:
            raise SideFailed(f"{self.name} gave other numbers of tokens than were asked for")
        return outcome

    def close(self) -> None:
        """End the process."""
        # Both hold the socket open.
        self._reader.close()
        self._connection.close()
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            self._send(message)
            return self._receive(_TURN_TIMEOUT_S)
        finally:
            self._signal(signal.SIGSTOP)

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise SideFailed(f"{self.name} has ended: {self._last_words()}") from None

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._connection.settimeout(timeout_s)
        try:
            line = self._reader.readline()
        except TimeoutError:
            raise SideFailed(f"{self.name} gave no answer within {timeout_s:.0f} s") from None
        except OSError:
            line = b""
        if not line:
            raise SideFailed(f"{self.name} has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        text = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else "without a word"

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
