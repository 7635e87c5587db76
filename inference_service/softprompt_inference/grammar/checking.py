"""Which grammars can be followed, found out by processes of their own: what one of them takes has bounds."""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from softprompt_api.errors import InvalidArgument, Overloaded, SoftpromptError, Unavailable
from softprompt_api.rpc.status import BY_REASON
from softprompt_api.structured import FIELD, StructuredOutputsParams

from softprompt_inference.grammar import checker

# More would only take processors from the model.
_PROCESSES = 2
_PATIENCE_S = 10.0
_MAX_KEPT = 1024
# How a process ends that somebody ends; who takes too much time, or memory, ends in other ways.
_WAS_ENDED = (-signal.SIGKILL, -signal.SIGTERM)

# Why it is refused, or how many seconds of a processor it takes to compile.
Verdict = SoftpromptError | float


class GrammarChecks:
    """Checks grammars for one model, each once as long as it is remembered.

    Args:
        folder: of the model, for its tokenizer.
        vocab_size: how many logits the model gives.
        max_cpu_s: what a grammar may take to compile, by one processor, for all choices of a request.
    """

    def __init__(self, folder: Path, *, vocab_size: int, max_cpu_s: int = 5) -> None:
        self._max_cpu_s = max_cpu_s
        # The working directory is no place to import from.
        program = (sys.executable, "-P", "-m", checker.__name__)
        self._command = (*program, str(folder), str(vocab_size), str(max_cpu_s))
        self._turns = asyncio.Semaphore(_PROCESSES)
        self._idle: list[asyncio.subprocess.Process] = []
        self._checks: dict[bytes, _Check] = {}
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    async def check(self, wanted: StructuredOutputsParams, *, num_choices: int = 1) -> None:
        """Return where outputs can follow it, for each of which it is compiled.

        Raises:
            InvalidArgument: the grammar is none, allows nothing, or takes too much.
            Unsupported: the model has no tokenizer that grammars can be made for.
            Overloaded: too many others are being checked.
        """
        key = hashlib.sha256(json.dumps(wanted.spelled).encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            verdict = self._verdicts[key]
        else:
            verdict = await self._wait_for(key, wanted)
        if isinstance(verdict, SoftpromptError):
            raise type(verdict)(verdict.message, field=FIELD)
        if verdict * num_choices > self._max_cpu_s:
            raise InvalidArgument(
                f"the grammar takes {verdict:.2g} s to compile, and {num_choices} choices together more than "
                f"{self._max_cpu_s} s; make it simpler, or ask for fewer",
                field=FIELD,
            )

    async def close(self) -> None:
        """End the processes."""
        checks = [check.task for check in self._checks.values()]
        for task in checks:
            task.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for process in self._idle:
            await _end(process)
        self._idle.clear()

    async def _wait_for(self, key: bytes, wanted: StructuredOutputsParams) -> Verdict:
        """The verdict on a grammar, which others may be waiting for; it is given up with the last of them."""
        check = self._checks.get(key)
        if check is None:
            check = self._checks[key] = _Check(asyncio.create_task(self._find(key, wanted)))
            # Its failure is told to who waits; when they have all gone, nobody is left to be told.
            check.task.add_done_callback(lambda done: done.cancelled() or done.exception())
        check.num_waiting += 1
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.shield(check.task)
        except TimeoutError:
            raise Overloaded("too many grammars wait to be compiled; try again later") from None
        finally:
            check.num_waiting -= 1
            if not check.num_waiting:
                check.task.cancel()
                if self._checks.get(key) is check:
                    del self._checks[key]

    async def _find(self, key: bytes, wanted: StructuredOutputsParams) -> Verdict:
        async with self._turns:
            verdict = await self._ask(wanted)
        self._verdicts[key] = verdict
        if len(self._verdicts) > _MAX_KEPT:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask(self, wanted: StructuredOutputsParams) -> Verdict:
        process = await self._take_process()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            process.stdin.write(json.dumps(wanted.spelled).encode() + b"\n")
            answer = await process.stdout.readline()
        finally:
            if answer:
                self._idle.append(process)
            else:
                await _end(process)
        if not answer:
            return self._took_too_much(process)
        told = json.loads(answer)
        return BY_REASON[told[0]](told[1]) if isinstance(told, list) else float(told)

    def _took_too_much(self, ended: asyncio.subprocess.Process) -> Verdict:
        if ended.returncode in _WAS_ENDED:
            raise Unavailable("the grammar could not be checked; try again")
        return InvalidArgument(
            f"the grammar takes more than {self._max_cpu_s} s or {checker.MAX_MEMORY_BYTES >> 20} MiB to compile; "
            "make it simpler"
        )

    async def _take_process(self) -> asyncio.subprocess.Process:
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )


@dataclass(slots=True)
class _Check:
    task: asyncio.Task[Verdict]
    num_waiting: int = field(default=0)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
