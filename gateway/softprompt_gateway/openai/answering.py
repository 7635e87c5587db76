"""From a checked request to an HTTP answer, whole or streamed; completions and chat differ only in their style."""

import asyncio
from collections.abc import Awaitable, Callable

import orjson
from softprompt_api.errors import SoftpromptError
from starlette.responses import Response

from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.errors import fields_spelled
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation, likeliest
from softprompt_gateway.openai.job import Job, usage_of
from softprompt_gateway.openai.streamed import Streamed
from softprompt_gateway.resolve import Named, Resolver, Target
from softprompt_gateway.sse import EventStream

JobWith = Callable[[Target], Awaitable[Job]]


class Answering:
    """Runs jobs on the inference service."""

    def __init__(self, resolver: Resolver, inference: InferenceClient, metrics: Metrics) -> None:
        self._resolver = resolver
        self._inference = inference
        self._metrics = metrics

    async def answer(self, named: Named, job_with: JobWith) -> Response:
        """The answer of the job with what a request names.

        Errors before the first token are raised, so that they have their own status.
        """
        job, generation = await self._begin(named, job_with)
        if job.stream:
            return EventStream(Streamed(job, generation, self._metrics), headers=job.target.headers())
        try:
            prompts = await generation.choices(job.choices_per_prompt)
        finally:
            job.meter.tokens += generation.num_tokens
        self._metrics.used(generation.usage)
        kept = job.kept_per_prompt or job.choices_per_prompt
        choices = [
            job.style.choice(prompt * kept + n, generation.accepted[prompt], choice)
            for prompt, of_prompt in enumerate(prompts)
            for n, choice in enumerate(likeliest(of_prompt, kept))
        ]
        body = {
            **job.identity(job.style.whole),
            "choices": choices,
            "usage": usage_of(generation.usage),
            **job.style.extras(generation.accepted),
        }
        return Response(orjson.dumps(body), media_type="application/json", headers=job.target.headers())

    async def _begin(self, named: Named, job_with: JobWith) -> tuple[Job, Generation]:
        """The job with the versions that names stand for now, and its generation.

        To ask what they stand for takes as long as a short prompt's step. So the job is begun with the versions
        that were last heard of, and nothing is said of it before the registry has answered; where that tells of
        others, it is begun anew.
        """
        known = self._resolver.known(named)
        if known is None or not known.adapters:
            return await self._start(await job_with(await self._resolver.resolve(named)))
        asking = asyncio.create_task(self._resolver.resolve(named))
        asking.add_done_callback(_look_at_error)
        begun: tuple[Job, Generation] | None = None
        failed: SoftpromptError | None = None
        is_kept = False
        try:
            try:
                begun = await self._start(await job_with(known))
            except SoftpromptError as error:
                failed = error
            target = await asking
            is_kept = target.is_same(known)
        finally:
            asking.cancel()
            if begun is not None and not is_kept:
                begun[1].cancel()
        if not is_kept:
            return await self._start(await job_with(target))
        if begun is None:
            assert failed is not None
            raise failed
        return begun

    async def _start(self, job: Job) -> tuple[Job, Generation]:
        with fields_spelled(adapter="model"):
            return job, await Generation.start(self._inference, job.calls)


def _look_at_error(task: "asyncio.Task[Target]") -> None:
    # Where the client has left, nobody else does, and asyncio would complain.
    if not task.cancelled():
        task.exception()
