"""Log-probabilities in the two shapes OpenAI has."""

from collections.abc import Iterable
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb


def chat_logprobs(tokens: Iterable[pb.TokenLogprob]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`."""
    content = [
        {**_entry(token.chosen), "top_logprobs": [_entry(entry) for entry in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Iterable[pb.TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """Parallel lists over tokens, and the text offset after the last.

    `top_logprobs` holds the chosen token too, so it can have one more entry than was asked for.
    """
    shape: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        shape["tokens"].append(token.chosen.token)
        shape["token_logprobs"].append(token.chosen.logprob)
        top: dict[str, float] = {}
        for entry in (*token.top, token.chosen):
            # Two tokens can read alike; the likelier one stands.
            top.setdefault(entry.token, entry.logprob)
        shape["top_logprobs"].append(top)
        shape["text_offset"].append(offset)
        offset += len(token.chosen.token)
    return shape, offset


def _entry(entry: pb.LogprobEntry) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.token_bytes)}
