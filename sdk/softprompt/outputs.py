"""What `LLM` returns, in the shape vLLM's users know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt.requests import LoRARequest, PromptAdapterRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """The log-probability of one token, from the model's unmodified logits.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: 1 for the likeliest token; None for a chosen token, or one of the prompt, below those that were asked
            for.
        decoded_token: the token's text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the `n` completions.
        text: the generated text, without the stop string unless that was asked for.
        token_ids: every generated token, also the one that ended it.
        cumulative_logprob: sum over the chosen tokens; None where no logprobs were asked for.
        logprobs: for each token the chosen and the likeliest tokens by id; None where none were asked for.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or stop token id that ended it; None for end of sequence or length.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Sequence[Mapping[int, Logprob]] | None
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt with its completions.

    Attributes:
        request_id: place of the prompt in all calls of this LLM.
        prompt: its text, without soft prompts inside; None where token ids were given.
        prompt_token_ids: its ids, without virtual tokens.
        outputs: its completions, by index.
        finished: always true; kept for code written for vLLM.
        prompt_adapter_request: the soft prompt in front of it, or several in order; None: none.
        lora_request: the LoRA it ran with; None: none.
        num_cached_tokens: positions of the prompt, virtual ones included, whose KV was at hand; of the first
            completion.
        prompt_logprobs: for each of prompt_token_ids, its own log-probability and those of the likeliest tokens by
            id; None for the first where no virtual token of embeddings stands before it, as nothing predicts it.
            None where they were not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    finished: bool = True
    prompt_adapter_request: PromptAdapterRequest | Sequence[PromptAdapterRequest] | None = None
    lora_request: LoRARequest | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = None
