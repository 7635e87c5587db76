"""One completion of a prompt, from the engine's outputs to what its reader sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt_api.errors import InternalError, SoftpromptError
from softprompt_api.rpc.status import BY_REASON

from softprompt_inference.engine.messages import Finish, Logprobs, Nearest, Output
from softprompt_inference.text import OutputText


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one choice. `logprobs` has one entry per token, or none at all."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A choice has ended, by STOP or LENGTH."""

    index: int
    reason: Finish
    stop_string: str | None = None
    stop_token_id: int | None = None


class Choice:
    """Reads the engine's outputs of one choice.

    Attributes:
        num_tokens: tokens read.
        cached_tokens: prompt positions that came from the prefix cache.
        has_ended: whether `Finished` was given; outputs after it are not wanted.
    """

    def __init__(self, index: int, text: OutputText) -> None:
        self._index = index
        self._text = text
        self.num_tokens = 0
        self.cached_tokens = 0
        self.has_ended = False

    def read(self, outputs: Sequence[Output]) -> list[Delta | Finished]:
        """The events that these outputs make: one Delta for all of them, and Finished where they end the choice.

        Raises the error that an output holds.
        """
        pieces: list[str] = []
        token_ids: list[int] = []
        logprobs: list[Logprobs] = []
        finished: Finished | None = None
        for output in outputs:
            if output.finish is Finish.ERROR:
                raise error_of(output)
            assert output.token_id is not None, "only an error comes without a token"
            self.cached_tokens += output.cached_tokens or 0
            token_ids.append(output.token_id)
            if output.logprobs is not None:
                logprobs.append(output.logprobs)
            pieces.append(self._text.push(output.token_id, ends_choice=output.finish is Finish.STOP))
            finished = self._end_of(output, pieces)
            if finished is not None:
                break
        self.num_tokens += len(token_ids)
        self.has_ended = finished is not None
        delta = Delta(index=self._index, text="".join(pieces), token_ids=token_ids, logprobs=logprobs)
        return [delta] if finished is None else [delta, finished]

    def _end_of(self, output: Output, pieces: list[str]) -> Finished | None:
        """The end, when the engine or a stop string ended the choice; what was held back joins `pieces`."""
        if output.finish is not None:
            pieces.append(self._text.finish())
        if self._text.stop_string is not None:
            return Finished(index=self._index, reason=Finish.STOP, stop_string=self._text.stop_string)
        if output.finish is None:
            return None
        return Finished(index=self._index, reason=output.finish, stop_token_id=output.stop_token_id)


def error_of(answer: Output | Nearest) -> SoftpromptError:
    """The error that the engine answered with."""
    leaf = BY_REASON.get(answer.error_reason, InternalError)
    return leaf(answer.error_message or "the engine failed on this request")
