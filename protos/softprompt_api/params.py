"""How tokens are chosen and when to stop: one set of parameters for HTTP, gRPC and Python."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from softprompt_api.errors import InvalidArgument
from softprompt_api.structured import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOKENS_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, checked when made; a bad value raises InvalidArgument naming the field.

    Attributes:
        max_tokens: most tokens to generate; None: as many as fit the context; 0: only the prompt is computed.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this; in (0, 1].
        top_k: keep this many most likely tokens; -1 or 0: all.
        min_p: drop tokens less likely than this share of the likeliest one.
        seed: same seed, prompt and parameters give the same output; None: random.
        presence_penalty, frequency_penalty: OpenAI's, over the output so far.
        repetition_penalty: over the prompt's text and the output so far; 1 is none.
        stop: strings that end the output.
        stop_token_ids: ids that end the output.
        min_tokens: no eos or stop token ends the output before this many tokens.
        ignore_eos: go on after the end-of-sequence token.
        logit_bias: added to the logits of these ids.
        logprobs: return each token's logprob and this many alternatives; None: none.
        prompt_logprobs: likewise for the tokens of the prompt's text.
        n: completions of the same prompt.
        include_stop_str_in_output: keep a stop string in the text.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what the output must be; None: anything. It ends when it is complete, whatever
            `min_tokens` and `ignore_eos` say.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        # None is how vLLM says that there are none of something.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", self.logit_bias or {})
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS_LIMIT)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _integer("top_k", self.top_k, -1, MAX_TOKENS_LIMIT)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 2.0, above_low=True)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS_LIMIT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}", field="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _integer(name, count, 0, MAX_LOGPROBS)
        _integer("n", self.n, 1, MAX_N)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be true or false", field=name)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidArgument(
                "structured_outputs must be a StructuredOutputsParams", field="structured_outputs"
            )
        self._check_stops()
        self._check_logit_bias()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidArgument(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", field="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidArgument(
                    f"each stop must be a string of 1 to {MAX_STOP_CHARACTERS} characters", field="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidArgument(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids", field="stop_token_ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, MAX_TOKENS_LIMIT)

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidArgument(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", field="logit_bias")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, MAX_TOKENS_LIMIT)
            _number("logit_bias", bias, -100.0, 100.0)

    def of_choice(self, index: int) -> "SamplingParams":
        """Those of one choice of a prompt: the first alone tells how likely that is."""
        if index == 0 or self.prompt_logprobs is None:
            return self
        return replace(self, prompt_logprobs=None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidArgument when an id lies outside [0, vocab_size)."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidArgument(
                        f"{name} has id {token_id}, but the vocabulary ends at {vocab_size - 1}", field=name
                    )


def _integer(name: str, value: int, low: int, high: int) -> None:
    # bool is an int in Python, and True is nobody's number.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgument(f"{name} must be an integer from {low} to {high}", field=name)


def _number(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (above_low and value == low):
        start = "above" if above_low else "from"
        raise InvalidArgument(f"{name} must be a number {start} {low:g} to {high:g}", field=name)
