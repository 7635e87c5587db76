"""The Generate calls of one HTTP request, one for each prompt: started together, read as one, stopped together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from softprompt_api.errors import AdapterNotFound, InternalError, SoftpromptError
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.clients import GenerateCall, InferenceClient
from softprompt_gateway.errors import ModelNotFound

Result = TypeVar("Result")
# Events that may wait for a reader, over all prompts; beyond, gRPC's flow control holds the services back.
_QUEUED_EVENTS = 64
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
    """All of one choice."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: pb.Finished = field(default_factory=pb.Finished)


class Generation:
    """Running calls, each already accepted.

    Attributes:
        accepted: what each prompt was bound to, in order of prompts.
        usage: the sum over prompts; complete after the last event.
    """

    def __init__(self, calls: Sequence[GenerateCall]) -> None:
        self._calls = calls
        self._streams = [call.events() for call in calls]
        self.accepted: list[pb.Accepted] = []
        self.usage = pb.Usage()

    @classmethod
    async def start(cls, inference: InferenceClient, requests: Sequence[pb.GenerateRequest]) -> "Generation":
        """Start a call for each prompt; if one is refused, none goes on."""
        generation = cls([inference.generate(request) for request in requests])
        try:
            generation.accepted = await all_of([_accepted(stream) for stream in generation._streams])
        except AdapterNotFound as error:
            generation.cancel()
            raise ModelNotFound(error.message) from None
        except BaseException:
            generation.cancel()
            raise
        return generation

    def cancel(self) -> None:
        """Abort what still runs."""
        for call in self._calls:
            call.cancel()

    async def events(self) -> AsyncIterator[tuple[int, pb.Delta | pb.Finished]]:
        """Deltas and ends with the number of their prompt, as they come; a failure cancels all calls."""
        try:
            if len(self._streams) == 1:
                async for event in self._outputs(self._streams[0]):
                    yield 0, event
            else:
                async for item in self._merged():
                    yield item
        finally:
            self.cancel()

    async def choices(self, per_prompt: int) -> list[list[Choice]]:
        """Every prompt's choices, complete."""
        choices = [[Choice() for _ in range(per_prompt)] for _ in self._calls]
        async for prompt, event in self.events():
            choice = choices[prompt][event.index]
            if isinstance(event, pb.Delta):
                choice.text.append(event.text)
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
            else:
                choice.finished = event
        return choices

    async def _merged(self) -> AsyncIterator[tuple[int, pb.Delta | pb.Finished]]:
        queue: asyncio.Queue[tuple[int, pb.Delta | pb.Finished] | None] = asyncio.Queue(_QUEUED_EVENTS)

        async def pump(prompt: int, stream: AsyncIterator[pb.GenerateResponse]) -> None:
            async for event in self._outputs(stream):
                await queue.put((prompt, event))

        async def pump_all() -> None:
            try:
                await all_of([pump(prompt, stream) for prompt, stream in enumerate(self._streams)])
            finally:
                await queue.put(None)

        pumping = asyncio.create_task(pump_all())
        try:
            while (item := await queue.get()) is not None:
                yield item
            await pumping
        finally:
            pumping.cancel()
            # Room for the end mark that the cancelled task still puts.
            while not queue.empty():
                queue.get_nowait()
            await asyncio.gather(pumping, return_exceptions=True)

    async def _outputs(self, stream: AsyncIterator[pb.GenerateResponse]) -> AsyncIterator[pb.Delta | pb.Finished]:
        complete = False
        async for response in stream:
            if response.HasField("delta"):
                yield response.delta
            elif response.HasField("finished"):
                yield response.finished
            elif response.HasField("usage"):
                complete = True
                self.usage.prompt_tokens += response.usage.prompt_tokens
                self.usage.completion_tokens += response.usage.completion_tokens
                self.usage.virtual_tokens += response.usage.virtual_tokens
                self.usage.cached_tokens += response.usage.cached_tokens
        if not complete:
            raise InternalError("a generation ended without its usage")


async def _accepted(stream: AsyncIterator[pb.GenerateResponse]) -> pb.Accepted:
    async for first in stream:
        if first.HasField("accepted"):
            return first.accepted
        break
    raise _not_accepted()


def _not_accepted() -> SoftpromptError:
    return InternalError("a generation began without being accepted")
