"""One checked request, and what all its answers say."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.style import Style
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one checked request wants generated, and for whom.

    Attributes:
        calls: one Generate request per prompt.
        choices_per_prompt: as many as each of them generates.
        meter: counts the tokens, and keeps what the log line tells.
    """

    target: Target
    calls: Sequence[pb.GenerateRequest]
    choices_per_prompt: int
    stream: bool
    meter: Meter


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Work):
    """One checked request whose answer has choices.

    Attributes:
        include_usage: whether a stream ends with the usage; `include_usage_so_far`: and each chunk has it, so far.
        silent: whether only text counts: a delta without text may be left out of a stream, and deltas that
            arrived together may be told as one.
        kept_per_prompt: the likeliest of a prompt's choices, so many, are the answer; None: all.
    """

    style: Style
    include_usage: bool
    include_usage_so_far: bool
    silent: bool
    kept_per_prompt: int | None = None

    def identity(self, kind: str) -> dict[str, Any]:
        """What an answer begins with; `kind` is the style's `whole` or `chunk`."""
        return {
            "id": f"{self.style.id_prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.target.model,
        }


def usage_of(usage: pb.Usage) -> dict[str, Any]:
    """OpenAI's usage; virtual tokens are told apart and are not prompt tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "virtual_tokens": usage.virtual_tokens,
        },
    }
