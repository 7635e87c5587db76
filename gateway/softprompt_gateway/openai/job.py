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
class Job:
    """One checked request.

    Attributes:
        calls: one Generate request per prompt.
        choices_per_prompt: as many as each of them generates.
        kept_per_prompt: the likeliest of them, so many, are the answer; None: all.
        silent: whether only text counts: a delta without text may be left out of a stream, and deltas that
            arrived together may be told as one.
        meter: counts the tokens.
    """

    target: Target
    calls: Sequence[pb.GenerateRequest]
    choices_per_prompt: int
    style: Style
    stream: bool
    include_usage: bool
    silent: bool
    meter: Meter
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
