"""What became of one request that generated: for its log line, and for metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt_api.inference.v1.inference_pb2 import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request that generated. Times are in seconds and count from its headers.

    Attributes:
        model: the base model's id.
        adapters: names of what was used beside it, across all tenants.
        usage: its tokens; of a request that was broken off, those that came.
        reasons: why each choice ended: "stop", "length", "abort" (the client left) or "error".
        is_whole: whether all of it was generated.
        duration_s: until its last token.
        first_token_s: until its first; None: there was none.
    """

    model: str
    adapters: Sequence[str]
    usage: Usage
    reasons: Sequence[str]
    is_whole: bool
    duration_s: float
    first_token_s: float | None

    @property
    def num_intervals(self) -> int:
        """Tokens that came after another of the same choice."""
        return max(0, self.usage.completion_tokens - len(self.reasons))

    def facts(self) -> dict[str, Any]:
        """For the log line."""
        first_token = {} if self.first_token_s is None else {"first_token_s": round(self.first_token_s, 4)}
        return {
            "prompt_tokens": self.usage.prompt_tokens,
            "virtual_tokens": self.usage.virtual_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "finished": ",".join(dict.fromkeys(self.reasons)),
            **first_token,
        }
