"""A generation from its request to its last event.

    admit → encode the prompt → compile the grammar
          → bind versions of its adapters, put all together and bring them in → Accepted
          → one engine request per choice → PromptLogprobs … → Delta … Finished → Usage

It runs for the time of a context: leaving it aborts what is unfinished and lets the adapter go. Its events are
made when they are taken, by whoever is told that there are some: no task wakes for a token.
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from softprompt_api.composition import check_number
from softprompt_api.errors import InvalidArgument, SoftpromptError
from softprompt_api.names import AdapterRef, choose_task, parse_model, parse_requested, with_task
from softprompt_api.params import SamplingParams
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion
from softprompt_api.tracing import span

from softprompt_inference.adapters.adapter import AdapterInfo
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.admission import Admission
from softprompt_inference.choice import Choice, Delta, Finished, PromptLogprobs
from softprompt_inference.composed import Bound, BoundAdapter, Composed, check_context, compose
from softprompt_inference.engine.messages import AddRequest, Command, ModelInfo, Nearest, Output, Stats
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.prompts import Prompt, PromptEncoder, soft_prompts_in, text_ids_of
from softprompt_inference.text import Encoded, SoftPrompt, Tokenizer

# What gathers while a reader is slow must not outgrow a message: with all logprobs a token takes about 1 kB.
_MAX_DELTA_TOKENS = 512


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
    async def find_nearest(self, digest: str, top_k: int) -> Nearest: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A request, parsed.

    Attributes:
        adapter: as users spell `model`; "" is the base model.
        salt: KV is shared only with requests that have the same.
        tenant: whose it is; those of several that wait start in turn.
    """

    prompt: Prompt
    params: SamplingParams
    adapter: str = ""
    salt: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request runs, with these adapters; none: the base model."""

    adapters: Sequence[BoundAdapter]
    prompt_token_ids: list[int]
    virtual_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted; see the proto."""

    prompt_tokens: int
    completion_tokens: int
    virtual_tokens: int
    cached_tokens: int


Event = Accepted | PromptLogprobs | Delta | Finished | Usage


class Generation:
    """A generation that runs.

    Args:
        bound, composed: its adapters, and its prompt with them.
        choices, streams: what it consists of, and the engine's outputs of each.

    Attributes:
        usage: its last event, once that was taken.
        failure: the error that ended it.
        began_s, first_output_at_s: when the engine was told of it and first heard of, on time.perf_counter.
    """

    def __init__(
        self, bound: Bound, composed: Composed, choices: Sequence[Choice], streams: Sequence[OutputStream]
    ) -> None:
        self._composed = composed
        self._accepted = Accepted(
            adapters=bound.every,
            prompt_token_ids=composed.text_ids,
            virtual_tokens=composed.virtual_tokens,
        )
        self._choices = choices
        self._streams = streams
        self._num_running = len(choices)
        self._is_told = False  # that it was accepted
        self._ready: dict[int, None] = {}  # choices with outputs, in the order in which these came
        self._notify: Callable[[], None] | None = None
        self.usage: Usage | None = None
        self.failure: SoftpromptError | None = None
        self.began_s = time.perf_counter()
        self.first_output_at_s: float | None = None
        for index, stream in enumerate(streams):
            stream.follow(partial(self._hear, index))

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` now, and whenever there is something to take."""
        self._notify = notify
        notify()

    def take(self) -> Sequence[Event]:
        """The next events, few enough for a message; none where nothing has come since the last.

        Raises the error that ended a choice.
        """
        if not self._is_told:
            self._is_told = True
            return [self._accepted]
        while (index := self._next_ready()) is not None:
            if events := self._read(index):
                return events
        if self._num_running or self.has_ended:
            return []
        self.usage = self._count()
        return [self.usage]

    @property
    def has_more(self) -> bool:
        """Whether there may be something to take."""
        return bool(self._ready) or not self._is_told or not (self._num_running or self.has_ended)

    @property
    def has_ended(self) -> bool:
        """Whether the last event was taken."""
        return self.usage is not None

    async def next(self) -> Sequence[Event]:
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

    def _next_ready(self) -> int | None:
        """The choice to read: the first, which tells of the prompt, before all others."""
        if self._choices[0].tells_prompt:
            return 0 if 0 in self._ready else None
        return next(iter(self._ready), None)

    def _read(self, index: int) -> list[PromptLogprobs | Delta | Finished]:
        choice, stream = self._choices[index], self._streams[index]
        # One output tells of many tokens of the prompt.
        most = 1 if choice.tells_prompt else _MAX_DELTA_TOKENS
        outputs = stream.take(most)
        if len(outputs) < most:
            del self._ready[index]
        if not outputs and choice.failure is None:
            return []
        if self.first_output_at_s is None:
            self.first_output_at_s = time.perf_counter()
        try:
            events = choice.read(outputs)
        except SoftpromptError as error:
            self.failure = error
            raise
        if choice.failure is not None:
            self._ready[index] = None  # behind what others have to say
        if choice.has_ended:
            self._num_running -= 1
            self._ready.pop(index, None)
            # A stop string ends a choice of which the engine knows nothing.
            stream.close()
        return events

    def _count(self) -> Usage:
        composed, choices = self._composed, self._choices
        return Usage(
            prompt_tokens=len(composed.text_ids),
            completion_tokens=sum(choice.num_tokens for choice in choices),
            virtual_tokens=composed.virtual_tokens,
            # The first choice's: the others find what it computed.
            cached_tokens=composed.count_text(choices[0].cached_tokens),
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
        admission: lets choices in.
    """

    def __init__(
        self,
        *,
        engine: EngineHandle,
        tokenizer: Tokenizer,
        prompts: PromptEncoder,
        source: AdapterSource,
        residency: Residency,
        grammars: GrammarChecks,
        base_model_id: str,
        admission: Admission,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._source = source
        self._residency = residency
        self._grammars = grammars
        self._base_model_id = base_model_id
        self._admission = admission
        self._eos_token_ids = tokenizer.ends_below(engine.info.vocab_size)
        self._numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def start(self, call: GenerateCall) -> AsyncIterator[Generation]:
        """A generation, for the time of the context; every SoftpromptError it raises is meant for the caller."""
        call.params.check_vocabulary(self._engine.info.vocab_size)
        with self._admission.admitted(call.params.n, call.tenant):
            with span("encode"):
                prompt = await self._prompts.encode(call.prompt, tenant=call.tenant)
            if not text_ids_of(prompt):
                raise InvalidArgument("the prompt is empty: it has no tokens", field="prompt")
            async with self._started(call, prompt) as generation:
                yield generation

    @contextlib.asynccontextmanager
    async def _started(self, call: GenerateCall, prompt: Encoded) -> AsyncIterator[Generation]:
        """A generation that was admitted, and its prompt encoded."""
        following = self._grammars.followed(
            call.params.structured_outputs, num_choices=call.params.n, tenant=call.tenant
        )
        async with following:
            with span("bind"):
                bound = await self.bind(call.adapter, soft_prompts_in(prompt))
            digests = [adapter.digest for adapter in bound.every]

            def put_together(adapters: Sequence[AdapterInfo]) -> Composed:
                composed = compose(prompt, bound, adapters)
                limit = self._engine.info.max_model_len
                check_context(composed, max_tokens=call.params.max_tokens, limit=limit)
                return composed

            # What cannot be computed is refused before it waits for room.
            using = self._residency.use(*digests, tenant=call.tenant, num=call.params.n, check=put_together)
            async with using as adapters:
                composed = put_together(adapters)
                choices = [self._make_choice(index, call.params, composed) for index in range(call.params.n)]
                with self._submitted(call, composed) as streams:
                    yield Generation(bound, composed, choices, streams)

    def _make_choice(self, index: int, params: SamplingParams, composed: Composed) -> Choice:
        told_ids = () if params.of_choice(index).prompt_logprobs is None else composed.text_ids
        return Choice(index, self._tokenizer.output_text(params), told_ids=told_ids)

    async def bind(self, spelling: str, inside: Sequence[str] = (), *, fetches: bool = False) -> Bound:
        """The versions that spellings stand for now: of what is in front of a prompt, and of what is inside.

        Args:
            fetches: they are most likely not in memory, and are fetched next.
        """
        front = self._parse(spelling)
        inner = {name: parse_requested(name, field="prompt") for name in inside}
        check_number(len(front) + len(inner), field="adapter")
        # Each once: two spellings of one request never stand for two versions of a name.
        resolve = self._source.resolve_to_fetch if fetches else self._source.resolve
        bound = {ref: await self._bind(ref, resolve) for ref in dict.fromkeys([*front, *inner.values()])}
        return Bound(front=[bound[ref] for ref in front], inside={name: bound[ref] for name, ref in inner.items()})

    @staticmethod
    async def _bind(ref: AdapterRef, resolve: Callable[[str], Awaitable[AdapterVersion]]) -> BoundAdapter:
        if ref.digest:  # its task is checked when it is fetched
            return BoundAdapter(spelling=str(ref), name="", version=0, digest=str(ref))
        version = await resolve(str(ref.whole))
        digest = with_task(version.digest, choose_task(ref, version.num_tasks))
        return BoundAdapter(spelling=str(ref), name=version.name, version=version.version, digest=digest)

    async def count_virtual_tokens(self, spelling: str, prompt: Encoded) -> int:
        """Virtual tokens of the versions that spellings stand for now, in front of a prompt and inside it."""
        inside = [parse_requested(part.adapter) for part in prompt if isinstance(part, SoftPrompt)]
        refs = [*self._parse(spelling), *inside]
        counts: dict[AdapterRef, int] = {}
        for ref in dict.fromkeys(refs):
            version = await self._source.resolve(str(ref.whole))
            choose_task(ref, version.num_tasks)
            counts[ref] = version.num_virtual_tokens
        return sum(counts[ref] for ref in refs)

    def _parse(self, spelling: str) -> Sequence[AdapterRef]:
        return parse_model(spelling, base_model_id=self._base_model_id, field="adapter") if spelling else ()

    @contextlib.contextmanager
    def _submitted(self, call: GenerateCall, composed: Composed) -> Iterator[list[OutputStream]]:
        """The outputs of each choice; the engine forgets what has not ended when the context does."""
        params = call.params
        seed = secrets.randbits(62) if params.seed is None else params.seed
        request_number = next(self._numbers)
        with contextlib.ExitStack() as open_streams:
            open_streams.callback(self._admission.measure, params.n)
            streams: list[OutputStream] = []
            for index in range(params.n):
                request = AddRequest(
                    request_id=f"{request_number}-{index}",
                    prompt=composed.parts,
                    params=params.of_choice(index),
                    eos_token_ids=self._eos_token_ids,
                    seed=seed + index,
                    salt=call.salt,
                    tenant=call.tenant,
                    lora=composed.lora,
                )
                self._engine.submit(request)
                streams.append(self._engine.outputs(request.request_id))
                # Closing a stream that has not ended aborts its request.
                open_streams.callback(streams[-1].close)
            yield streams
