"""Log-probabilities in the shapes that OpenAI has, and vLLM's of prompts."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb

# JSON has no infinity: what a model rules out is as unlikely as this, which is vLLM's word for it.
_LEAST = -9999.0


def chat_logprobs(tokens: Iterable[pb.TokenLogprob]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`."""
    content = [
        {**_entry(token.chosen), "top_logprobs": [_entry(entry) for entry in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Iterable[pb.TokenLogprob], places: "OutputPlaces") -> dict[str, Any]:
    """Parallel lists over tokens, the next ones of an output.

    `top_logprobs` holds the chosen token too, so it can have one more entry than was asked for.
    """
    shape = _lists()
    for token in tokens:
        _append(shape, token, offset=places.place(token.chosen), num_top=len(token.top))
    return shape


class OutputPlaces:
    """Where the tokens of an output stand in its text, told in order. Parts of a character stand where it does.

    Args:
        start: offset of the first, in characters.
        skips_special: whether the text leaves special tokens out.
    """

    def __init__(self, start: int, *, skips_special: bool) -> None:
        self._offset = start
        self._skips_special = skips_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def place(self, token: pb.LogprobEntry) -> int:
        """Offset of the next token, in characters."""
        offset = self._offset
        if not (token.is_special and self._skips_special):
            self._offset += len(self._decoder.decode(token.token_bytes))
        return offset


class EchoedText:
    """A prompt's text, and where its tokens stand in it: told in order, each by its bytes.

    A token that the text lacks, such as a special one that the tokenizer wrote by itself, takes no room in it.
    Parts of a character stand where it does.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._num_shown = 0

    def place(self, token: bytes) -> int:
        """Offset of the next token, in characters."""
        offset, before = self._offset, self._decoder.getstate()
        # Some tokenizers read the first word as if a space were before it.
        for spelled in (token, token.removeprefix(b" ")):
            text = self._decoder.decode(spelled)
            if self._text.startswith(text, offset):
                self._offset += len(text)
                break
            self._decoder.setstate(before)
        return offset

    def show(self, *, is_last: bool) -> str:
        """The text of the tokens placed since the last look; with the last token, all that is left."""
        start, self._num_shown = self._num_shown, len(self._text) if is_last else self._offset
        return self._text[start : self._num_shown]


def echoed_logprobs(told: Iterable[pb.PromptLogprobs], text: EchoedText, *, num_top: int) -> dict[str, Any]:
    """As `completion_logprobs`, of a prompt; null for a token that nothing predicts."""
    shape = _lists()
    for token, is_predicted in _predicted(told):
        offset = text.place(token.chosen.token_bytes)
        _append(shape, token, offset=offset, num_top=num_top, is_predicted=is_predicted)
    return shape


def prompt_logprobs(told: Iterable[pb.PromptLogprobs], *, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token its own and the likeliest by id; null where nothing predicts it."""
    return [_by_id(token, num_top) if is_predicted else None for token, is_predicted in _predicted(told)]


def _predicted(told: Iterable[pb.PromptLogprobs]) -> Iterator[tuple[pb.TokenLogprob, bool]]:
    for piece in told:
        for index, token in enumerate(piece.tokens):
            yield token, index > 0 or not piece.starts_unpredicted


def _lists() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(
    shape: dict[str, Any], token: pb.TokenLogprob, *, offset: int, num_top: int, is_predicted: bool = True
) -> None:
    top: dict[str, float] = {}
    for entry in (*token.top[:num_top], token.chosen):
        # Two tokens can read alike; the likelier one stands.
        top.setdefault(_spelled(entry), _finite(entry.logprob))
    shape["tokens"].append(_spelled(token.chosen))
    shape["token_logprobs"].append(_finite(token.chosen.logprob) if is_predicted else None)
    shape["top_logprobs"].append(top if is_predicted else None)
    shape["text_offset"].append(offset)


def _spelled(entry: pb.LogprobEntry) -> str:
    """A token's text, or its bytes as OpenAI spells them where it is not whole UTF-8."""
    try:
        entry.token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token_bytes)
    return entry.token


def _by_id(token: pb.TokenLogprob, num_top: int) -> dict[str, Any]:
    ranks = {entry.token_id: rank for rank, entry in enumerate(token.top[:num_top], start=1)}
    return {
        str(entry.token_id): {
            "logprob": _finite(entry.logprob),
            "rank": ranks.get(entry.token_id),
            "decoded_token": entry.token,
        }
        for entry in (token.chosen, *token.top[:num_top])
    }


def _entry(entry: pb.LogprobEntry) -> dict[str, Any]:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.token_bytes)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
