"""How a generation ended: one log line, and the parts of its span."""

import time

import structlog
from softprompt_api.tracing import Span

from softprompt_inference.generation import GenerateCall, Generation

_log = structlog.get_logger()


class Ending:
    """Tells how a generation ended, when it has.

    Args:
        span: its own, where it is traced.

    Attributes:
        generation: it, once it runs.
        reason: of the error that it ended with, if one has reached its caller.
    """

    def __init__(self, call: GenerateCall, span: Span | None) -> None:
        self._call = call
        self._span = span
        self._began_s = time.perf_counter()
        self.generation: Generation | None = None
        self.reason = ""

    def tell(self) -> None:
        """It has ended."""
        generation = self.generation
        usage = generation.usage if generation is not None else None
        facts: dict[str, str | int | float] = {"adapter": self._call.adapter}
        if usage is not None:
            facts |= {
                "prompt_tokens": usage.prompt_tokens,
                "virtual_tokens": usage.virtual_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            }
        else:
            failure = generation.failure if generation is not None else None
            facts["cause"] = self.reason or (failure.reason if failure is not None else "aborted")
        self._trace(facts)
        seconds = round(time.perf_counter() - self._began_s, 3)
        _log.info("generated" if usage is not None else "not generated", **facts, seconds=seconds)

    def _trace(self, facts: dict[str, str | int | float]) -> None:
        if self._span is None:
            return
        self._span.set({f"softprompt.{name}": value for name, value in facts.items()})
        if "cause" in facts:
            self._span.fail(str(facts["cause"]))
        generation = self.generation
        if generation is not None:
            ended_s = time.perf_counter()
            first_s = generation.first_output_at_s or ended_s
            self._span.add("first token", generation.began_s, first_s)
            if generation.first_output_at_s is not None:
                self._span.add("decode", first_s, ended_s)
