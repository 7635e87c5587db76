"""A generation from its request to its last event.

    admit → encode the prompt → compile the grammar → bind an adapter version and bring it in → check the context
          → Accepted
          → one engine request per choice → Delta … Finished → Usage

It runs for the time of a context: leaving it aborts what is unfinished and lets the adapter go. Its events are
made when they are taken, by whoever is told that there are some: no task wakes for a token.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from softprompt_api.errors import ContextLengthExceeded, InvalidArgument, Overloaded
from softprompt_api.names import AdapterRef, choose_task, parse_model, with_task
from softprompt_api.params import SamplingParams
from softprompt_api.structured import FIELD as STRUCTURED
from softprompt_api.structured import StructuredOutputsParams

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.choice import Choice, Delta, Finished
from softprompt_inference.engine.messages import (
    AddRequest,
    Command,
    ModelInfo,
    Output,
    SoftPromptPart,
    Stats,
    TextPart,
)
from softprompt_inference.grammar import GrammarCompiler
from softprompt_inference.prompts import Prompt, PromptEncoder
from softprompt_inference.text import Tokenizer

# What gathers while a reader is slow must not outgrow a message: with all logprobs a token takes about 1 kB.
_MAX_DELTA_TOKENS = 512
_GRAMMAR_TIMEOUT_S = 10.0


class OutputStream(Protocol):
    """The engine's outputs of one request; see `softprompt_inference.engine.client.OutputStream`."""

    def follow(self, notify: Callable[[], None]) -> None: ...
    def take(self, most: int) -> list[Output]: ...
    def close(self) -> None: ...


class EngineHandle(Protocol):
    """What the front needs of the engine; the real one is `softprompt_inference.engine.client.EngineClient`."""

    info: ModelInfo
    stats: Stats

    def submit(self, command: Command) -> None: ...
    def outputs(self, request_id: str) -> OutputStream: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A request, parsed. `adapter` is spelled as users spell it; "" is the base model."""

    prompt: Prompt
    params: SamplingParams
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundAdapter:
    """The one version a request is computed with. `name` and `version` are "" and 0 when it named a digest.

    `digest` has the task behind it where the adapter has tasks.
    """

    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request runs; `adapter` is None for the base model."""

    adapter: BoundAdapter | None
    prompt_token_ids: list[int]
    virtual_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted; see the proto."""

    prompt_tokens: int
    completion_tokens: int
    virtual_tokens: int
    cached_tokens: int


Event = Accepted | Delta | Finished | Usage


class Generation:
    """A generation that runs.

    Args:
        accepted: its first event.
        choices, streams: what it consists of, and the engine's outputs of each.

    Attributes:
        usage: its last event, once that was taken.
    """

    def __init__(self, accepted: Accepted, choices: Sequence[Choice], streams: Sequence[OutputStream]) -> None:
        self._accepted = accepted
        self._choices = choices
        self._streams = streams
        self._num_running = len(choices)
        self._is_told = False  # that it was accepted
        self._ready: dict[int, None] = {}  # choices with outputs, in the order in which these came
        self._notify: Callable[[], None] | None = None
        self.usage: Usage | None = None
        for index, stream in enumerate(streams):
            stream.follow(partial(self._hear, index))

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` now, and whenever there is something to take."""
        self._notify = notify
        notify()

    def take(self) -> list[Event]:
        """The next events, few enough for a message; none where nothing has come since the last.

        Raises the error that ended a choice.
        """
        if not self._is_told:
            self._is_told = True
            return [self._accepted]
        events: list[Event] = []
        while self._ready and not events:
            events += self._read(next(iter(self._ready)))
        if not events and not self._num_running and self.usage is None:
            self.usage = self._count()
            events.append(self.usage)
        return events

    @property
    def has_ended(self) -> bool:
        """Whether the last event was taken."""
        return self.usage is not None

    async def next(self) -> list[Event]:
        """The next events, once there are any; none at the end."""
        changed = asyncio.Event()
        self._notify = changed.set
        while not (events := self.take()) and not self.has_ended:
            await changed.wait()
            changed.clear()
        return events

    def _hear(self, index: int) -> None:
        self._ready[index] = None
        if self._notify is not None:
            self._notify()

    def _read(self, index: int) -> list[Delta | Finished]:
        choice, stream = self._choices[index], self._streams[index]
        outputs = stream.take(_MAX_DELTA_TOKENS)
        if len(outputs) < _MAX_DELTA_TOKENS:
            del self._ready[index]
        if not outputs:
            return []
        events = choice.read(outputs)
        if choice.has_ended:
            self._num_running -= 1
            self._ready.pop(index, None)
            # A stop string ends a choice of which the engine knows nothing.
            stream.close()
        return events

    def _count(self) -> Usage:
        accepted, choices = self._accepted, self._choices
        return Usage(
            prompt_tokens=len(accepted.prompt_token_ids),
            completion_tokens=sum(choice.num_tokens for choice in choices),
            virtual_tokens=accepted.virtual_tokens,
            # The first choice's: the others find what it computed.
            cached_tokens=max(0, choices[0].cached_tokens - accepted.virtual_tokens),
        )


class Generator:
    """Runs generations over one engine.

    Args:
        engine: the engine.
        tokenizer: the model's.
        prompts: encodes prompts.
        source: resolves adapters.
        residency: holds adapters in the engine.
        grammars: says which grammars are none, before the engine compiles them.
        base_model_id: a spelling of the base model, beside "".
        max_open_choices: most choices that run or wait; more are Overloaded.
    """

    def __init__(
        self,
        *,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        prompts: PromptEncoder,
        source: AdapterSource,
        residency: Residency,
        grammars: GrammarCompiler,
        base_model_id: str,
        max_open_choices: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._source = source
        self._residency = residency
        self._grammars = grammars
        self._base_model_id = base_model_id
        self._max_open_choices = max_open_choices
        self._num_open_choices = 0
        self._numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def start(self, call: GenerateCall) -> AsyncIterator[Generation]:
        """A generation, for the time of the context; every SoftpromptError it raises is meant for the caller."""
        call.params.check_vocabulary(self._engine.info.vocab_size)
        with self._admitted(call.params.n):
            token_ids = await self._prompts.encode(call.prompt)
            if not token_ids:
                raise InvalidArgument("the prompt is empty: it has no tokens", field="prompt")
            await self._check_grammar(call.params.structured_outputs)
            bound = await self.bind(call.adapter)
            async with self._resident(bound) as adapter:
                virtual_tokens = adapter.num_virtual_tokens if adapter else 0
                self._check_context(len(token_ids), virtual_tokens, call.params.max_tokens)
                accepted = Accepted(adapter=bound, prompt_token_ids=token_ids, virtual_tokens=virtual_tokens)
                choices = [
                    Choice(index, self._tokenizer.output_text(call.params)) for index in range(call.params.n)
                ]
                with self._submitted(call.params, token_ids, adapter) as streams:
                    yield Generation(accepted, choices, streams)

    async def _check_grammar(self, wanted: StructuredOutputsParams | None) -> None:
        if wanted is None:
            return
        compiling = self._grammars.start(wanted)
        try:
            async with asyncio.timeout(_GRAMMAR_TIMEOUT_S):
                await asyncio.wrap_future(compiling)
        except TimeoutError:
            if compiling.cancelled():
                raise Overloaded("too many grammars wait to be compiled; try again later") from None
            raise InvalidArgument(
                f"the grammar takes more than {_GRAMMAR_TIMEOUT_S:g} s to compile; make it simpler",
                field=STRUCTURED,
            ) from None

    async def bind(self, spelling: str) -> BoundAdapter | None:
        """The version that a spelling stands for now; None for the base model."""
        ref = self._parse(spelling)
        if ref is None:
            return None
        if ref.digest:  # its task is checked when it is fetched
            return BoundAdapter(name="", version=0, digest=str(ref))
        version = await self._source.resolve(str(ref.whole))
        task = choose_task(ref, version.num_tasks)
        return BoundAdapter(name=version.name, version=version.version, digest=with_task(version.digest, task))

    async def count_virtual_tokens(self, spelling: str) -> int:
        """Virtual tokens of the version that a spelling stands for now."""
        ref = self._parse(spelling)
        if ref is None:
            return 0
        version = await self._source.resolve(str(ref.whole))
        choose_task(ref, version.num_tasks)
        return version.num_virtual_tokens

    def _parse(self, spelling: str) -> AdapterRef | None:
        return parse_model(spelling, base_model_id=self._base_model_id, field="adapter") if spelling else None

    @contextlib.contextmanager
    def _submitted(
        self, params: SamplingParams, token_ids: list[int], adapter: Adapter | None
    ) -> Iterator[list[OutputStream]]:
        """The outputs of each choice; the engine forgets what has not ended when the context does."""
        prompt: list[TextPart | SoftPromptPart] = [TextPart(token_ids=token_ids)]
        lora = ""
        if adapter is not None and adapter.is_lora:
            lora = adapter.digest
        elif adapter is not None:
            prompt.insert(0, SoftPromptPart(digest=adapter.digest))
        seed = secrets.randbits(62) if params.seed is None else params.seed
        request_number = next(self._numbers)
        with contextlib.ExitStack() as open_streams:
            streams: list[OutputStream] = []
            for index in range(params.n):
                request = AddRequest(
                    request_id=f"{request_number}-{index}",
                    prompt=prompt,
                    params=params,
                    eos_token_ids=list(self._tokenizer.eos_token_ids),
                    seed=seed + index,
                    lora=lora,
                )
                self._engine.submit(request)
                streams.append(self._engine.outputs(request.request_id))
                # Closing a stream that has not ended aborts its request.
                open_streams.callback(streams[-1].close)
            yield streams

    @contextlib.asynccontextmanager
    async def _resident(self, bound: BoundAdapter | None) -> AsyncIterator[Adapter | None]:
        """The adapter, held in the engine; None for the base model."""
        if bound is None:
            yield None
            return
        async with self._residency.use(bound.digest) as adapter:
            yield adapter

    @contextlib.contextmanager
    def _admitted(self, num_choices: int) -> Iterator[None]:
        if self._num_open_choices + num_choices > self._max_open_choices:
            raise Overloaded(
                f"{self._num_open_choices} completions run or wait, and at most {self._max_open_choices} may; "
                "try again later"
            )
        self._num_open_choices += num_choices
        try:
            yield
        finally:
            self._num_open_choices -= num_choices

    def _check_context(self, num_tokens: int, virtual_tokens: int, max_tokens: int | None) -> None:
        limit = self._engine.info.max_model_len
        num_prompt = num_tokens + virtual_tokens
        if num_prompt + (max_tokens or 1) <= limit:
            return
        output = "at least 1 token of output" if max_tokens is None else f"max_tokens {max_tokens}"
        raise ContextLengthExceeded(
            f"the prompt has {num_tokens} tokens + {virtual_tokens} virtual tokens + {output}, "
            f"the limit is {limit}",
            field="prompt" if num_prompt >= limit else "max_tokens",
        )
