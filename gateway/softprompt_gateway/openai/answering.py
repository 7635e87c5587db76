"""From a checked request to an HTTP answer, whole or streamed; completions and chat differ only in their style."""

import orjson
from starlette.responses import Response

from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.errors import fields_spelled
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation, likeliest
from softprompt_gateway.openai.job import Job, usage_of
from softprompt_gateway.openai.streamed import Streamed
from softprompt_gateway.sse import EventStream


class Answering:
    """Runs jobs on the inference service."""

    def __init__(self, inference: InferenceClient, metrics: Metrics) -> None:
        self._inference = inference
        self._metrics = metrics

    async def answer(self, job: Job) -> Response:
        """The answer; errors before the first token are raised, so that they have their own status."""
        with fields_spelled(adapter="model"):
            generation = await Generation.start(self._inference, job.calls)
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
