"""From a checked response request to an HTTP answer, whole or streamed."""

from starlette.responses import Response

from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.job import Work
from softprompt_gateway.openai.responses.answer import Answer
from softprompt_gateway.openai.responses.events import Events, Unheard
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.responses.streamed import StreamedResponse
from softprompt_gateway.openai.settling import settle
from softprompt_gateway.openai.starting import Starting
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Named, Target
from softprompt_gateway.sse import EventStream


class Responding:
    """Runs response requests, as `answering` does those that have choices."""

    def __init__(self, starting: Starting, metrics: Metrics) -> None:
        self._starting = starting
        self._metrics = metrics

    async def respond(self, request: ResponsesRequest, named: Named, *, request_id: str, meter: Meter) -> Response:
        """The answer; errors before the first token are raised, so that they have their own status."""

        async def work_with(target: Target) -> Work:
            return Work(
                target=target,
                calls=[request.call(target, request_id=request_id)],
                choices_per_prompt=1,
                stream=bool(request.stream),
                meter=meter,
            )

        work, generation = await self._starting.begin(named, work_with)
        events = Events() if work.stream else Unheard()
        answer = Answer(request, work.target, events)
        headers = work.target.headers
        if work.stream:
            streamed = StreamedResponse(work, answer, events, generation, self._metrics)
            return EventStream(streamed, headers=headers, broken=streamed.broken)
        await self._complete(work, answer, generation)
        return Response(answer.json(), media_type="application/json", headers=headers)

    async def _complete(self, work: Work, answer: Answer, generation: Generation) -> None:
        try:
            [[choice]] = await generation.choices(work.choices_per_prompt)
        finally:
            settle(work, generation, self._metrics)
        answer.begin(generation.accepted[0])
        answer.add("".join(choice.text), choice.token_ids, choice.logprobs)
        answer.end(choice.finished, generation.usage)
