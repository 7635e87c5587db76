"""From a checked request to an HTTP answer, whole or streamed; completions and chat differ only in their style."""

from collections.abc import Awaitable, Callable

import orjson
from starlette.responses import Response

from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import likeliest
from softprompt_gateway.openai.job import Job, usage_of
from softprompt_gateway.openai.settling import settle
from softprompt_gateway.openai.starting import Starting
from softprompt_gateway.openai.streamed import Streamed
from softprompt_gateway.resolve import Named, Target
from softprompt_gateway.sse import EventStream


class Answering:
    """Runs jobs on the inference services."""

    def __init__(self, starting: Starting, metrics: Metrics) -> None:
        self._starting = starting
        self._metrics = metrics

    async def answer(self, named: Named, job_with: Callable[[Target], Awaitable[Job]]) -> Response:
        """The answer of the job with what a request names.

        Errors before the first token are raised, so that they have their own status.
        """
        job, generation = await self._starting.begin(named, job_with)
        if job.stream:
            return EventStream(Streamed(job, generation, self._metrics), headers=job.target.headers)
        num_choices = job.choices_per_prompt
        try:
            prompts = await generation.choices(num_choices)
        finally:
            settle(job, generation, self._metrics)
        kept = job.kept_per_prompt or num_choices
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
        return Response(orjson.dumps(body), media_type="application/json", headers=job.target.headers)
