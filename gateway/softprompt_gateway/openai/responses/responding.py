"""From a checked response request to an HTTP answer, whole or streamed."""

from starlette.responses import Response

from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.answering import Answering
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.job import Work
from softprompt_gateway.openai.responses.answer import Answer
from softprompt_gateway.openai.responses.events import Events, Unheard
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.responses.streamed import StreamedResponse
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Target
from softprompt_gateway.sse import EventStream


class Responding:
    """Runs response requests, as `answering` does those that have choices."""

    def __init__(self, answering: Answering, metrics: Metrics) -> None:
        self._answering = answering
        self._metrics = metrics

    async def respond(
        self, request: ResponsesRequest, target: Target, *, request_id: str, meter: Meter
    ) -> Response:
        """The answer; errors before the first token are raised, so that they have their own status."""
        work = Work(
            target=target,
            calls=[request.call(target, request_id=request_id)],
            choices_per_prompt=1,
            stream=bool(request.stream),
            meter=meter,
        )
        events = Events() if work.stream else Unheard()
        answer = Answer(request, target, events)
        generation = await self._answering.start(work)
        if work.stream:
            streamed = StreamedResponse(work, answer, events, generation, self._metrics)
            return EventStream(streamed, headers=target.headers(), broken=streamed.broken)
        await self._complete(work, answer, generation)
        return Response(answer.json(), media_type="application/json", headers=target.headers())

    async def _complete(self, work: Work, answer: Answer, generation: Generation) -> None:
        try:
            [[choice]] = await generation.choices(work.choices_per_prompt)
        finally:
            work.meter.tokens += generation.num_tokens
        self._metrics.used(generation.usage)
        answer.begin(generation.accepted[0])
        answer.add("".join(choice.text), choice.token_ids, choice.logprobs)
        answer.end(choice.finished, generation.usage)
