"""The front's side of the engine process: start it, send commands, hand out each request's outputs."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from softprompt_api.errors import Overloaded, Unavailable

from softprompt_inference.engine.codec import Message, Progress, StartupFailed
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import (
    Abort,
    AbortSearch,
    AddRequest,
    Command,
    FindNearest,
    Finish,
    ModelInfo,
    Nearest,
    Output,
    Ping,
    Stats,
    StepResult,
)
from softprompt_inference.engine.pipe import Pipe
from softprompt_inference.engine.steps import Steps

_log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
# Run as `python -m ENGINE_MODULE --fd N --files-fd M`; benchmarks put an engine that computes nothing here.
ENGINE_MODULE = "softprompt_inference.engine"
# What readers leave lying of all requests together: entries of some 100 bytes, a token or one of its alternatives.
_MAX_HELD = 2**21
# How often an engine is asked for a sign of life before it is given up.
_NUM_PINGS = 4


def _nobody(*_: str) -> None:
    """Nobody is told."""


class EngineStartError(RuntimeError):
    """The engine process could not start; the text says why in plain words."""


class OutputStream:
    """The outputs of one request, until its last. Who follows it is told of each, and takes them when it likes.

    It holds what its reader leaves lying; where all requests together hold too much, the one that holds most
    ends with Overloaded. One reader only. A reader that leaves before the last output closes it (or uses it in a
    `with` block), which aborts the request.

    Attributes:
        held: entries that were not taken.
    """

    def __init__(self, client: "EngineClient", request_id: str) -> None:
        self._client = client
        self._request_id = request_id
        self._outputs: list[Output] = []
        self.held = 0
        self._notify: Callable[[], None] = _nobody
        self._has_ended = False  # the last output has arrived

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever an output arrives, at once; it must not raise."""
        self._notify = notify

    def take(self, most: int) -> list[Output]:
        """What has arrived and was not taken, the oldest first; no more than `most`."""
        outputs = self._outputs
        if len(outputs) <= most:
            self._outputs = []
            self._hold(-self.held)
        else:
            outputs, self._outputs = outputs[:most], outputs[most:]
            self._hold(-sum(map(_weigh, outputs)))
        if self._has_ended and not self._outputs:
            self._client._forget(self._request_id, abort=False)
        return outputs

    def close(self) -> None:
        """Want no more; the engine frees the request's pages before its next step."""
        self._client._forget(self._request_id, abort=not self._has_ended)
        self._has_ended = True
        self._outputs.clear()
        self._hold(-self.held)
        self._notify = _nobody

    def _hold(self, weight: int) -> None:
        self.held += weight
        self._client._num_held += weight

    def _break_off(self) -> None:
        """Let go of all that was not taken, and end with an error; the engine forgets the request."""
        self._client._forget(self._request_id, abort=not self._has_ended)
        self._outputs.clear()
        self._hold(-self.held)
        self._put(
            Output(
                request_id=self._request_id,
                finish=Finish.ERROR,
                error_reason=Overloaded.reason,
                error_message="the answer was read too slowly, and too much of it waited to be read; try again",
            )
        )

    def _put(self, output: Output) -> None:
        self._outputs.append(output)
        self._hold(_weigh(output))
        self._has_ended = output.finish is not None
        self._notify()


def _weigh(output: Output) -> int:
    """Entries that an output is."""
    if output.logprobs is None and output.prompt_logprobs is None:
        return 1
    weight = 1 if output.logprobs is None else 1 + len(output.logprobs.top)
    if output.prompt_logprobs is not None:
        weight += sum(1 if told is None else 1 + len(told.top) for told in output.prompt_logprobs)
    return weight


class EngineClient:
    """A running engine process.

    Attributes:
        info: the loaded model.
        steps: that it computes.
        stats: the engine's load at its last step.
        dead: done when the process has ended, with the reason in plain words, also after `stop`.
    """

    info: ModelInfo

    _pipe: Pipe

    def __init__(self, process: asyncio.subprocess.Process, report: Callable[[str], None]) -> None:
        """Made by `start`."""
        self._process = process
        self._report = report
        self._streams: dict[str, OutputStream] = {}
        self._num_held = 0  # by all streams
        self.steps = Steps(self._are_held_up)
        self._searches: dict[int, asyncio.Future[Nearest]] = {}
        self._num_searches = 0
        self._tell_failed_load: Callable[[str], None] = _nobody
        self._tell_stats: Callable[[], None] = _nobody
        self._living: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._has_spoken = False  # since it was last asked to
        self._silence_s = 0.0  # for which it was given up
        self._is_stopping = False
        self.stats = Stats()
        self._ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        report: Callable[[str], None],
        *,
        model_path: Awaitable[Path] | None = None,
        silence_s: float | None = None,
    ) -> Self:
        """Start a process and wait until its model is loaded. It ends with the thread that calls this.

        Args:
            config: what to load.
            report: is told each slow phase as it begins.
            model_path: the config's own, which becomes known while the process prepares; None: it is known.
            silence_s: an engine that has its model and says nothing for so long is ended; None: none is.

        Raises EngineStartError when it cannot start. Cancelling ends the process.
        """
        ours, theirs = socket.socketpair()
        to_files, from_files = socket.socketpair()
        try:
            with theirs, from_files:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P"),  # the working directory is no place to import from
                    *("-m", ENGINE_MODULE),
                    *("--fd", str(theirs.fileno()), "--files-fd", str(from_files.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), from_files.fileno()],
                )
        except BaseException:
            ours.close()
            to_files.close()
            raise
        client = cls(process, report)
        client._pipe = await Pipe.connect(ours, to_files, client._hear)
        try:
            client._pipe.send(config.preparation())
            if model_path is not None:
                config = replace(config, model_path=str(await model_path))
            client._pipe.send(config)
            client.info = await client._wait_until_ready()
        except BaseException:
            client._kill()
            await client.stop()
            raise
        client._living = asyncio.create_task(client._live())
        if silence_s is not None:
            client._watching = asyncio.create_task(client._watch(silence_s))
        return client

    async def _wait_until_ready(self) -> ModelInfo:
        either: tuple[asyncio.Future[Any], ...] = (self._ready, self._pipe.ended)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            raise EngineStartError(await self._exit_reason())
        return self._ready.result()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def submit(self, command: Command) -> None:
        """Send a command; commands are carried out in order. Raises Unavailable when the engine has ended.

        An AddRequest's outputs are kept from now on until `outputs` is asked for them; its id must not be open.
        """
        self._check_alive()
        if isinstance(command, AddRequest) and command.request_id in self._streams:
            raise ValueError(f"request id {command.request_id} is open already")
        self._pipe.send(command)
        if isinstance(command, AddRequest):
            self._streams[command.request_id] = OutputStream(self, command.request_id)

    def outputs(self, request_id: str) -> OutputStream:
        """The outputs of a submitted request; KeyError when it is not open."""
        return self._streams[request_id]

    def follow_loads(self, notify: Callable[[str], None]) -> None:
        """Call `notify` with the digest of each adapter that was not loaded, but may be if it is sent again."""
        self._tell_failed_load = notify

    def follow_stats(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever `stats` are new."""
        self._tell_stats = notify

    async def find_nearest(self, digest: str, top_k: int) -> Nearest:
        """The tokens nearest to each row of an adapter, which must stay resident until the answer.

        Cancelling takes the search back.
        """
        self._num_searches += 1
        search_id = self._num_searches
        self.submit(FindNearest(search_id=search_id, digest=digest, top_k=top_k))
        answer: asyncio.Future[Nearest] = asyncio.get_running_loop().create_future()
        self._searches[search_id] = answer
        try:
            return await answer
        finally:
            del self._searches[search_id]
            if answer.cancelled() and not self._is_stopping and not self.dead.done():
                self._pipe.send(AbortSearch(search_id=search_id))

    async def stop(self) -> None:
        """End the engine; open requests get an error. Harmless when it has ended."""
        self._is_stopping = True
        if self._watching is not None:
            self._watching.cancel()
        self._pipe.close()
        await self._wait_for_exit()
        await self._pipe.ended
        if self._living is not None:
            await self._living

    async def _wait_for_exit(self) -> int:
        """The exit code of a process whose socket has closed; one that stays is killed."""
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_GRACE_S)
        except TimeoutError:
            self._kill()
            return await self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _exit_reason(self) -> str:
        code = await self._wait_for_exit()
        if self._is_stopping:
            return "the engine was stopped"
        if self._silence_s:
            return f"the engine said nothing for {self._silence_s:g} s, and was ended"
        return f"the engine was killed by signal {-code}" if code < 0 else f"the engine ended with code {code}"

    def _check_alive(self) -> None:
        if self._is_stopping or self.dead.done():
            raise Unavailable("the engine is stopping or has ended; try again")

    async def _live(self) -> None:
        error = await self._pipe.ended
        if error is not None:
            _log.error("the engine's answer makes no sense; it is ended", exc_info=error)
            self._kill()
        self._end(await self._exit_reason())

    async def _watch(self, silence_s: float) -> None:
        """End an engine that hangs or was stopped: it does not say that it does."""
        num_silent = 0
        # Counted in sleeps, not in time: while this process itself is stopped, the engine cannot be heard.
        while num_silent < _NUM_PINGS:
            self._has_spoken = False
            self._pipe.send(Ping())
            await asyncio.sleep(silence_s / _NUM_PINGS)
            num_silent = 0 if self._has_spoken else num_silent + 1
        self._silence_s = silence_s
        self._kill()

    def _hear(self, message: Message) -> None:
        self._has_spoken = True
        match message:
            case StepResult():
                self._deliver(message)
            case Progress(text=text):
                self._report(text)
            case ModelInfo():
                self._ready.set_result(message)
            case StartupFailed(message=text):
                self._ready.set_exception(EngineStartError(text))
            case _:
                raise TypeError(f"an engine does not say {type(message).__name__}")

    def _deliver(self, result: StepResult) -> None:
        self.stats = result.stats
        self._tell_stats()
        self.steps.end()
        # Before those who needed it hear of it, and ask again.
        for digest in result.failed_loads:
            self._tell_failed_load(digest)
        for output in result.outputs:
            # An aborted request may still have outputs on their way.
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream._put(output)
        if self._num_held > _MAX_HELD:
            self._end_slowest()
        for found in result.found:
            search = self._searches.get(found.search_id)
            if search is not None and not search.done():
                search.set_result(found)

    def _are_held_up(self) -> bool:
        """Whether steps wait for other work here: on a CPU, where requests run; others only have not been read."""
        return self.info.device == "cpu" and not all(stream._has_ended for stream in self._streams.values())

    def _end_slowest(self) -> None:
        """Break off the request, with all its choices, of which most was not taken."""
        choices: defaultdict[str, list[OutputStream]] = defaultdict(list)
        for request_id, stream in self._streams.items():
            choices[request_id.partition("-")[0]].append(stream)
        if not choices:
            return
        for stream in max(choices.values(), key=lambda streams: sum(stream.held for stream in streams)):
            stream._break_off()

    def _end(self, reason: str) -> None:
        self.dead.set_result(reason)
        if self._watching is not None:
            self._watching.cancel()
        self.stats = replace(self.stats, running=0, waiting=0, used_pages=0, resident_adapters=0)
        for search in self._searches.values():
            if not search.done():
                search.set_exception(Unavailable("the engine has ended; try again"))
        for request_id, stream in list(self._streams.items()):
            if not stream._has_ended:
                stream._put(
                    Output(
                        request_id=request_id,
                        finish=Finish.ERROR,
                        error_reason=Unavailable.reason,
                        error_message="the engine has ended; try again",
                    )
                )

    def _forget(self, request_id: str, *, abort: bool) -> None:
        if self._streams.pop(request_id, None) is None:
            return
        if abort and not self._is_stopping and not self.dead.done():
            self._pipe.send(Abort(request_id=request_id))
