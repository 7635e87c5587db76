"""One completion of a prompt, from the engine's outputs to what its reader sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt_api.errors import InternalError, SoftpromptError
from softprompt_api.rpc.status import BY_REASON

from softprompt_inference.engine.messages import Finish, Logprobs, Nearest, Output
from softprompt_inference.text import OutputText


@dataclass(slots=True)
class Delta:
    """New output of one choice. `logprobs` has one entry per token, or none at all."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """How likely the next tokens of the prompt's text are; None for one that nothing computed stands before."""

    token_ids: Sequence[int]
    logprobs: Sequence[Logprobs | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A choice has ended, by STOP or LENGTH."""

    index: int
    reason: Finish
    stop_string: str | None = None
    stop_token_id: int | None = None


class Choice:
    """Reads the engine's outputs of one choice.

    Args:
        told_ids: the prompt's text, where it is to be told how likely that is.

    Attributes:
        num_tokens: tokens read.
        cached_tokens: prompt positions that came from the prefix cache.
        has_ended: whether `Finished` was given; outputs after it are not wanted.
        failure: the error that ends it, which the next `read` raises.
    """

    def __init__(self, index: int, text: OutputText, *, told_ids: Sequence[int] = ()) -> None:
        self._index = index
        self._text = text
        self._untold_ids = told_ids
        self.num_tokens = 0
        self.cached_tokens = 0
        self.has_ended = False
        self.failure: SoftpromptError | None = None

    @property
    def tells_prompt(self) -> bool:
        """Whether more is to come of the prompt; it comes before anything else."""
        return bool(self._untold_ids)

    def read(self, outputs: Sequence[Output]) -> list[PromptLogprobs | Delta | Finished]:
        """The events that these outputs make: what is told of the prompt, one Delta for all tokens, and Finished
        where they end the choice.

        Raises the error that an output holds, but what came before it is read first.
        """
        events: list[PromptLogprobs | Delta | Finished] = []
        pieces: list[str] = []
        token_ids: list[int] = []
        logprobs: list[Logprobs] = []
        finished: Finished | None = None
        for output in outputs:
            if output.finish is Finish.ERROR:
                self.failure = error_of(output)
                break
            if output.prompt_logprobs is not None:
                events.append(self._tell(output.prompt_logprobs))
                continue
            self.cached_tokens += output.cached_tokens or 0
            if output.token_id is not None:
                token_ids.append(output.token_id)
                if output.logprobs is not None:
                    logprobs.append(output.logprobs)
                pieces.append(self._text.push(output.token_id, ends_choice=output.finish is Finish.STOP))
            if output.finish is not None or self._text.stop_string is not None:
                finished = self._end_of(output, pieces)
                break
        self.num_tokens += len(token_ids)
        self.has_ended = finished is not None
        if token_ids:
            events.append(Delta(self._index, "".join(pieces), token_ids, logprobs))
        if finished is not None:
            events.append(finished)
        if self.failure is not None and not events:
            raise self.failure
        return events

    def _tell(self, logprobs: Sequence[Logprobs | None]) -> PromptLogprobs:
        count = len(logprobs)
        told_ids, self._untold_ids = self._untold_ids[:count], self._untold_ids[count:]
        return PromptLogprobs(token_ids=told_ids, logprobs=logprobs)

    def _end_of(self, output: Output, pieces: list[str]) -> Finished:
        """The end, which the engine or a stop string brought; what was held back joins `pieces`."""
        if output.finish is not None:
            pieces.append(self._text.finish())
        if self._text.stop_string is not None:
            return Finished(index=self._index, reason=Finish.STOP, stop_string=self._text.stop_string)
        assert output.finish is not None
        return Finished(index=self._index, reason=output.finish, stop_token_id=output.stop_token_id)


def error_of(answer: Output | Nearest) -> SoftpromptError:
    """The error that the engine answered with."""
    leaf = BY_REASON.get(answer.error_reason, InternalError)
    return leaf(answer.error_message or "the engine failed on this request", field=answer.error_field)
