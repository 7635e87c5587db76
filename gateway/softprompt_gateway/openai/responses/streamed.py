"""A response as server-sent events."""

from collections.abc import Callable

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.errors import ErrorBody
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.job import Work
from softprompt_gateway.openai.responses.answer import Answer
from softprompt_gateway.openai.responses.events import Events
from softprompt_gateway.openai.settling import settle
from softprompt_gateway.session import Delta


class StreamedResponse:
    """The events of one response, as far as it was generated; see `softprompt_gateway.sse.Events`.

    Args:
        answer: tells `events`.
    """

    def __init__(
        self, work: Work, answer: Answer, events: Events, generation: Generation, metrics: Metrics
    ) -> None:
        self._work = work
        self._answer = answer
        self._events = events
        self._generation = generation
        self._metrics = metrics
        self._finished = pb.Finished()
        self._has_begun = False
        self.has_ended = False

    @property
    def has_more(self) -> bool:
        """Whether there is something to take, if only the end or an error."""
        return not self.has_ended and (not self._has_begun or self._generation.has_more)

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever there is something to take."""
        self._generation.follow(notify)

    def take(self) -> bytes:
        """The events since the last look; raises the error that ended the generation."""
        if not self._has_begun:
            self._has_begun = True
            self._answer.begin(self._generation.accepted[0])
            return self._events.take()
        deltas = []
        for _, event in self._generation.take():
            if isinstance(event, Delta):
                deltas.append(event)
            elif isinstance(event, pb.Finished):
                self._finished = event
        self._add(deltas)
        if self._generation.has_ended:
            self.has_ended = True
            self._answer.end(self._finished, self._generation.usage)
        return self._events.take()

    def broken(self, error: ErrorBody) -> bytes:
        """The last events of a response that breaks off."""
        self._answer.fail(error)
        return self._events.take()

    def close(self) -> None:
        """Abort what still runs, and count what was generated."""
        self._generation.cancel()
        settle(self._work, self._generation, self._metrics)

    def _add(self, deltas: list[Delta]) -> None:
        """What came together is told together."""
        if deltas:
            self._answer.add(
                "".join([delta.text for delta in deltas]),
                [token_id for delta in deltas for token_id in delta.token_ids],
                [logprob for delta in deltas for logprob in delta.logprobs],
            )
