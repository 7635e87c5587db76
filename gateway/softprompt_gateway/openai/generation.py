"""The generations of one HTTP request, one for each prompt: started together, read as one, stopped together."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from softprompt_api.errors import AdapterNotFound, InternalError, SoftpromptError
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.errors import ModelNotFound
from softprompt_gateway.placement import Place
from softprompt_gateway.session import Calls, Delta, Event

Result = TypeVar("Result")
_FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


async def all_of(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def finish_reason(finished: pb.Finished) -> str:
    """OpenAI's word for why a choice ended."""
    return _FINISH_REASONS.get(finished.reason, "stop")


def stop_reason(finished: pb.Finished) -> str | int | None:
    """The stop string or stop token id that ended a choice, if one did."""
    if finished.HasField("stop_string"):
        return finished.stop_string
    return finished.stop_token_id if finished.HasField("stop_token_id") else None


@dataclass(slots=True, kw_only=True)
class Choice:
    """All of one choice.

    Attributes:
        prompt: how likely its prompt is, in order; the same for all choices of a prompt.
    """

    prompt: list[pb.PromptLogprobs] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: pb.Finished = field(default_factory=pb.Finished)


def likeliest(choices: list[Choice], count: int) -> list[Choice]:
    """So many of a prompt's choices, the likeliest per token first; all, as they are, where so many are wanted."""
    if count == len(choices):
        return choices
    return sorted(choices, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(choice: Choice) -> float:
    logprobs = [token.chosen.logprob for token in choice.logprobs]
    return sum(logprobs) / max(1, len(logprobs))


class Generation:
    """Running calls, each already accepted.

    Attributes:
        accepted: what each prompt was bound to, in order of prompts.
        usage: the sum over prompts; complete after the last event.
        has_ended: whether the last event was taken.
        has_failed: whether it broke off with an error.
        finished: the choices that have ended.
        first_token_at_s, ended_at_s: when the first token and the last event were taken, on time.perf_counter.
    """

    def __init__(self, calls: Calls, num_prompts: int) -> None:
        self._calls = calls
        self._num_running = num_prompts
        self._early: list[tuple[int, Event]] = []  # came together with what accepted the last prompt
        self.accepted = [pb.Accepted()] * num_prompts
        self.usage = pb.Usage()
        self.has_ended = False
        self.has_failed = False
        self.finished: list[pb.Finished] = []
        self.first_token_at_s: float | None = None
        self.ended_at_s: float | None = None
        self._num_generated = 0

    @classmethod
    async def start(
        cls, inference: InferenceClient, place: Place, requests: Sequence[pb.GenerateRequest]
    ) -> "Generation":
        """Start a call for each prompt where they belong; if one is refused, none goes on."""
        generation = cls(inference.generate(place, requests), len(requests))
        try:
            await generation._wait_until_accepted()
        except AdapterNotFound as error:
            raise ModelNotFound(error.message) from None
        except BaseException:
            generation.cancel()
            raise
        return generation

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts, and of what was taken so far."""
        return sum(len(one.prompt_token_ids) for one in self.accepted) + self._num_generated

    @property
    def usage_so_far(self) -> pb.Usage:
        """The tokens of the prompts, and of what was taken so far; which were cached is told at the end."""
        return pb.Usage(
            prompt_tokens=self.num_tokens - self._num_generated,
            completion_tokens=self._num_generated,
            virtual_tokens=sum(one.virtual_tokens for one in self.accepted),
        )

    def cancel(self) -> None:
        """Abort what still runs."""
        self._calls.cancel()

    async def _wait_until_accepted(self) -> None:
        waiting = set(range(len(self.accepted)))
        while waiting:
            await self._calls.wait()
            arrived = self._calls.take()
            for prompt, event in arrived:
                if isinstance(event, pb.Accepted):
                    self.accepted[prompt] = event
                    waiting.discard(prompt)
                else:
                    self._early.append((prompt, event))
            if not arrived or any(prompt in waiting for prompt, _ in self._early):
                raise InternalError("a generation began without being accepted")

    @property
    def has_more(self) -> bool:
        """Whether there is something to take, if only the end or an error."""
        return not self.has_ended and (bool(self._early) or self._calls.has_more)

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever there is something to take."""
        self._calls.follow(notify)

    def take(self) -> list[tuple[int, Delta | pb.Finished | pb.PromptLogprobs]]:
        """Deltas, ends and what is told of prompts, with the prompt's number: all since the last look, in order.

        Raises the error of the call that failed first, after what came before it; a failure of one cancels all.
        """
        try:
            arrived, self._early = self._early or self._calls.take(), []
        except SoftpromptError:
            self.has_failed = True
            raise
        had_tokens = self._num_generated
        events: list[tuple[int, Delta | pb.Finished | pb.PromptLogprobs]] = []
        for prompt, event in arrived:
            if isinstance(event, Delta):
                self._num_generated += len(event.token_ids)
                events.append((prompt, event))
            elif isinstance(event, pb.PromptLogprobs):
                events.append((prompt, event))
            elif isinstance(event, pb.Finished):
                self.finished.append(event)
                events.append((prompt, event))
            elif isinstance(event, pb.Usage):
                self._add(event)
        if not had_tokens and self._num_generated:
            self.first_token_at_s = time.perf_counter()
        if self._calls.is_over:
            if self._num_running:
                raise InternalError("a generation ended without its usage")
            self.has_ended = True
            self.ended_at_s = time.perf_counter()
        return events

    async def choices(self, per_prompt: int) -> list[list[Choice]]:
        """Every prompt's choices, complete."""
        told: list[list[pb.PromptLogprobs]] = [[] for _ in self.accepted]
        choices = [[Choice(prompt=one) for _ in range(per_prompt)] for one in told]
        try:
            while not self.has_ended:
                await self._calls.wait()
                for prompt, event in self.take():
                    if isinstance(event, pb.PromptLogprobs):
                        told[prompt].append(event)
                        continue
                    choice = choices[prompt][event.index]
                    if isinstance(event, Delta):
                        choice.text.append(event.text)
                        choice.token_ids += event.token_ids
                        choice.logprobs += event.logprobs
                    else:
                        choice.finished = event
        finally:
            self.cancel()
        return choices

    def _add(self, usage: pb.Usage) -> None:
        self._num_running -= 1
        self.usage.prompt_tokens += usage.prompt_tokens
        self.usage.completion_tokens += usage.completion_tokens
        self.usage.virtual_tokens += usage.virtual_tokens
        self.usage.cached_tokens += usage.cached_tokens
