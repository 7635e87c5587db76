"""From a checked response request to an HTTP answer, whole or streamed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from softprompt_api.inference.v1 import inference_pb2 as pb
from starlette.responses import Response

from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.responses.answer import Answer
from softprompt_gateway.openai.responses.events import Events, Unheard
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.responses.streamed import StreamedResponse
from softprompt_gateway.openai.settling import settle
from softprompt_gateway.openai.starting import Starting
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Named, Target
from softprompt_gateway.sse import EventStream


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request, and the versions that its names stand for."""

    target: Target
    meter: Meter
    calls: Sequence[pb.GenerateRequest]


class Responding:
    """Runs response requests, as `answering` does those that have choices."""

    def __init__(self, starting: Starting, metrics: Metrics) -> None:
        self._starting = starting
        self._metrics = metrics

    async def respond(self, request: ResponsesRequest, named: Named, *, request_id: str, meter: Meter) -> Response:
        """The answer; errors before the first token are raised, so that they have their own status."""

        async def asked(target: Target) -> _Asked:
            return _Asked(target=target, meter=meter, calls=[request.call(target, request_id=request_id)])

        work, generation = await self._starting.begin(named, asked)
        target = work.target
        events = Events() if request.stream else Unheard()
        answer = Answer(request, target, events)
        settled = partial(settle, generation, self._metrics, target=target, meter=meter, num_choices=1)
        if request.stream:
            streamed = StreamedResponse(answer, events, generation, settled)
            return EventStream(streamed, headers=target.headers(), broken=streamed.broken)
        await _complete(answer, generation, settled)
        return Response(answer.json(), media_type="application/json", headers=target.headers())


async def _complete(answer: Answer, generation: Generation, settled: Callable[[], None]) -> None:
    try:
        [[choice]] = await generation.choices(1)
    finally:
        settled()
    answer.begin(generation.accepted[0])
    answer.add("".join(choice.text), choice.token_ids, choice.logprobs)
    answer.end(choice.finished, generation.usage)
