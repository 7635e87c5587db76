"""Many prompts through one engine at once, in this thread."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from softprompt_inference.choice import Choice, Delta, Finished, PromptLogprobs
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import Abort, AddRequest, Logprobs, Output
from softprompt_inference.text import Tokenizer

from softprompt.outputs import CompletionOutput, Logprob


@dataclass(slots=True, kw_only=True)
class Running:
    """One choice of a prompt: its request, and what has come of it."""

    index: int
    request: AddRequest
    choice: Choice
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, output: Output) -> None:
        """Read one output; the error it holds is raised."""
        for event in self.choice.read([output]):
            match event:
                case Delta():
                    self.pieces.append(event.text)
                    self.token_ids += event.token_ids
                    self.logprobs += event.logprobs
                case PromptLogprobs():
                    self.prompt_logprobs += event.logprobs
                case Finished():
                    self.finished = event

    def completion(self, tokenizer: Tokenizer) -> CompletionOutput:
        """The finished choice as users see it."""
        assert self.finished is not None
        has_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self.pieces),
            token_ids=self.token_ids,
            cumulative_logprob=sum(entry.chosen for entry in self.logprobs) if has_logprobs else None,
            logprobs=[_shown(*pair, tokenizer) for pair in zip(self.token_ids, self.logprobs, strict=True)]
            if has_logprobs
            else None,
            finish_reason=self.finished.reason.value,
            stop_reason=self.finished.stop_string or self.finished.stop_token_id,
        )


def shown_prompt(
    first: Running, prompt_ids: Sequence[int], tokenizer: Tokenizer
) -> list[Mapping[int, Logprob] | None] | None:
    """How likely each token of a prompt is, which its first choice was told; None where that was not asked for."""
    if first.request.params.prompt_logprobs is None:
        return None
    return [
        None if logprobs is None else _shown(token_id, logprobs, tokenizer)
        for token_id, logprobs in zip(prompt_ids, first.prompt_logprobs, strict=True)
    ]


def run(engine: Engine, prompts: Sequence[Sequence[Running]], on_finished: Callable[[], None]) -> None:
    """Generate all choices of all prompts; `on_finished` is called once for each prompt.

    Raises the error of the first choice that fails. A failed or interrupted run leaves nothing in the engine.
    """
    running = {one.request.request_id: one for siblings in prompts for one in siblings}
    siblings_of = {one.request.request_id: siblings for siblings in prompts for one in siblings}
    with _aborting(engine, running):
        for one in running.values():
            engine.handle(one.request)
        while running:
            assert engine.has_work, "the engine has forgotten a request"
            for output in engine.step().outputs:
                one = running[output.request_id]
                one.take(output)
                if one.finished is None:
                    continue
                if output.finish is None:  # a stop string ends it; the engine does not know text
                    engine.handle(Abort(request_id=output.request_id))
                del running[output.request_id]
                if all(sibling.finished for sibling in siblings_of[output.request_id]):
                    on_finished()


@contextmanager
def _aborting(engine: Engine, running: dict[str, Running]) -> Iterator[None]:
    try:
        yield
    finally:
        for request_id in running:
            engine.handle(Abort(request_id=request_id))


def _shown(token_id: int, logprobs: Logprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    top = {
        other: Logprob(logprob=value, rank=rank, decoded_token=tokenizer.token_text(other))
        for rank, (other, value) in enumerate(logprobs.top, start=1)
    }
    if token_id in top:
        return top
    chosen = Logprob(logprob=logprobs.chosen, rank=None, decoded_token=tokenizer.token_text(token_id))
    return {token_id: chosen, **top}
