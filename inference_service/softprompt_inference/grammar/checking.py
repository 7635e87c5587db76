"""Which grammars can be followed, found out by processes of their own: what one of them takes has bounds.

So has what all take together: the engine compiles a grammar anew for each output, which keeps that to its end.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from softprompt_api.errors import InvalidArgument, Overloaded, SoftpromptError, Unavailable
from softprompt_api.rpc.status import BY_REASON
from softprompt_api.shares import Shares
from softprompt_api.structured import FIELD, StructuredOutputsParams
from softprompt_api.waiting import wait_for_shared

from softprompt_inference.grammar import checker
from softprompt_inference.turns import Places

# More would only take processors from the model.
_PROCESSES = 2
_PATIENCE_S = 10.0
_ENDING_S = 1.0
_MAX_KEPT = 1024
# What all outputs may take together: so many times what a request may, in parts of that.
_MAX_REQUESTS = 4
_PARTS = 1000
# How a process ends that somebody ends; who takes too much time, or memory, ends in other ways.
_WAS_ENDED = (-signal.SIGKILL, -signal.SIGTERM)

# Why it is refused, or what an output takes, as a share of what a request may.
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
        self._turns = Places(_PROCESSES)
        self._idle: list[asyncio.subprocess.Process] = []
        self._starting: asyncio.Task[None] | None = None
        self._checks: dict[bytes, _Check] = {}
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._followed = Shares(_MAX_REQUESTS * _PARTS, what="thousandths of the costliest grammar are in use")

    @asynccontextmanager
    async def followed(
        self, wanted: StructuredOutputsParams | None, *, num_choices: int = 1, tenant: str = ""
    ) -> AsyncIterator[None]:
        """Let outputs follow it for the time of the context, for each of which it is compiled; None: any text.

        Raises:
            InvalidArgument: the grammar is none, allows nothing, or takes too much.
            Unsupported: the model has no tokenizer that grammars can be made for.
            Overloaded: too many others are being checked, or followed.
        """
        if wanted is None:
            yield
            return
        share = await self.check(wanted, num_choices=num_choices, tenant=tenant)
        with self._followed.holding(tenant, math.ceil(share * num_choices * _PARTS)):
            yield

    async def check(self, wanted: StructuredOutputsParams, *, num_choices: int = 1, tenant: str = "") -> float:
        """What an output that follows it takes, as a share of what a request may; raises as `followed` does."""
        key = hashlib.sha256(json.dumps(wanted.spelled).encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            verdict = self._verdicts[key]
        else:
            verdict = await self._wait_for(key, wanted, tenant)
        if isinstance(verdict, SoftpromptError):
            raise type(verdict)(verdict.message, field=FIELD)
        if verdict * num_choices > 1:
            raise InvalidArgument(
                f"the grammar takes {verdict:.2g} of {self._limits} to compile, and {num_choices} choices "
                "together more than that; make it simpler, or ask for fewer",
                field=FIELD,
            )
        return verdict

    async def close(self) -> None:
        """End the processes."""
        checks = [check.task for check in self._checks.values()]
        tasks = checks if self._starting is None else [*checks, self._starting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self._idle:
            await _end(process)
        self._idle.clear()

    async def _wait_for(self, key: bytes, wanted: StructuredOutputsParams, tenant: str) -> Verdict:
        """The verdict on a grammar, which others may be waiting for; it is given up with the last of them."""
        check = self._checks.get(key)
        if check is None:
            check = self._checks[key] = _Check(asyncio.create_task(self._find(key, wanted, tenant)))
        check.num_waiting += 1
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await wait_for_shared(check.task)
        except TimeoutError:
            raise Overloaded("too many grammars wait to be compiled; try again later") from None
        finally:
            check.num_waiting -= 1
            if not check.num_waiting:
                check.task.cancel()
                if self._checks.get(key) is check:
                    del self._checks[key]

    async def _find(self, key: bytes, wanted: StructuredOutputsParams, tenant: str) -> Verdict:
        async with self._turns.taken(tenant):
            verdict = await self._ask(wanted)
        self._verdicts[key] = verdict
        if len(self._verdicts) > _MAX_KEPT:
            self._verdicts.popitem(last=False)
        return verdict

    async def _ask(self, wanted: StructuredOutputsParams) -> Verdict:
        process = await self._take_process()
        assert process.stdin is not None
        process.stdin.write(json.dumps(wanted.spelled).encode() + b"\n")
        answer = await self._read(process)
        if not answer:
            return self._took_too_much(process)
        told = json.loads(answer)
        return BY_REASON[told[0]](told[1]) if isinstance(told, list) else float(told)

    async def _read(self, process: asyncio.subprocess.Process) -> bytes:
        """A line of a process, which is idle then; one that says nothing, or that nobody waits for, is ended."""
        assert process.stdout is not None
        line = b""
        try:
            line = await process.stdout.readline()
            if not line:
                # It has ended. Who kills it now may take the news of how from asyncio, which then tells 255.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _ENDING_S)
        finally:
            if line:
                self._idle.append(process)
            else:
                await _end(process)
        return line

    def _took_too_much(self, ended: asyncio.subprocess.Process) -> Verdict:
        if ended.returncode in _WAS_ENDED:
            raise Unavailable("the grammar could not be checked; try again")
        return InvalidArgument(f"the grammar takes more than {self._limits} to compile; make it simpler")

    @property
    def _limits(self) -> str:
        return f"{self._max_cpu_s} s or {checker.MAX_MEMORY_BYTES >> 20} MiB"

    async def _take_process(self) -> asyncio.subprocess.Process:
        while True:
            while self._idle:
                process = self._idle.pop()
                if process.returncode is None:
                    return process
            if self._starting is None:
                # Whoever asked may leave before it is ready: where that takes long, it would never be.
                self._starting = asyncio.create_task(self._start())
                self._starting.add_done_callback(self._end_start)
            await wait_for_shared(self._starting)

    async def _start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )
        if not await self._read(process):
            raise Unavailable("the process that checks grammars does not start; its error is in the service's log")

    def _end_start(self, _started: asyncio.Task[None]) -> None:
        self._starting = None


@dataclass(slots=True)
class _Check:
    task: asyncio.Task[Verdict]
    num_waiting: int = field(default=0)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
