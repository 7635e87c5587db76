"""How far one output is in its grammar; llguidance does the work."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger(__name__)

_REASONS = {
    "NoExtension": "no text follows it",
    "NoExtensionBias": "no text follows it",
    "LexerTooComplex": "it is too complex",
    "ParserTooComplex": "it is too complex",
}


class GrammarMatcher:
    """The engine's `Matcher`. Whatever goes wrong in it is told in `error`, and ends this output alone.

    Args:
        matcher: at the grammar's beginning, and nobody else's.
        vocab_size: how many tokens it is asked about.

    Attributes:
        error: why it cannot go on; "" while it can.
    """

    def __init__(self, matcher: "LLMatcher", *, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_bytes = 4 * -(-vocab_size // 32)
        self.error = ""

    def allowed(self, banned_ids: Sequence[int]) -> bytes:
        """Whether each token may come next: bit i % 8 of byte i // 8, in whole words of 32 bits.

        Banned tokens may not, unless nothing else may. None may where there is an error.
        """
        mask = self._matcher.compute_bitmask()[: self._num_bytes]  # it may have a word more
        if self._matcher.is_error():
            self._fail()
            return bytes(self._num_bytes)
        if not banned_ids:
            return mask
        kept = bytearray(mask)
        for token_id in banned_ids:
            kept[token_id >> 3] &= ~(1 << (token_id & 7))
        return bytes(kept) if any(kept) else mask

    def accept(self, token_id: int) -> None:
        """Go on by this token; behind the grammar's end there is nothing to go on to."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> None:
        self.error = f"the output cannot follow its grammar any further: {explain(self._matcher)}"


def explain(matcher: "LLMatcher") -> str:
    """Why a matcher is in error, in words."""
    error = one_line(matcher.get_error())
    if error.startswith("panic"):
        _log.warning("llguidance failed on a grammar: %s", error)
        return "it cannot be compiled"
    return _REASONS.get(error, error)


def one_line(text: str, max_characters: int = 300) -> str:
    """A message cut to what can be shown."""
    return " ".join(text.split())[:max_characters]
