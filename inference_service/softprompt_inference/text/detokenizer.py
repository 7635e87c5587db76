"""The text of one choice, token by token."""

from codecs import utf_8_decode

from softprompt_api.params import SamplingParams

from softprompt_inference.text.stops import StopScanner
from softprompt_inference.text.vocabulary import Vocabulary


class OutputText:
    """Turns the tokens of one choice into text that can be shown at once and never changes.

    Held back are the bytes of an incomplete character and text that may become a stop string. All pieces joined
    are the whole text, however it was read. A token costs microseconds, so this may run on an event loop.

    Attributes:
        stop_string: the stop string that was found; then the choice has ended.
    """

    def __init__(self, vocabulary: Vocabulary, params: SamplingParams) -> None:
        self._vocabulary = vocabulary
        self._skipped_ids = vocabulary.special_ids if params.skip_special_tokens else frozenset()
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._rest = b""  # of a character that is not whole
        self._scanner = StopScanner(params.stop) if params.stop else None
        self._num_tokens = 0
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_id: int, *, ends_choice: bool = False) -> str:
        """The text that became certain with this token.

        Args:
            ends_choice: the token is an end-of-sequence or stop token; it shows only with
                `include_stop_str_in_output`.
        """
        assert self.stop_string is None, "the choice has ended"
        self._num_tokens += 1
        if token_id in self._skipped_ids or (ends_choice and not self._keeps_stop):
            return ""
        return self._take(self._decode(self._vocabulary.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stop_string is not None:
            return ""
        shown = self._take(self._decode(b"", is_last=True))
        if self.stop_string is not None:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _decode(self, data: bytes, *, is_last: bool = False) -> str:
        if self._rest:
            data = self._rest + data
        text, num_read = utf_8_decode(data, "replace", is_last)
        self._rest = data[num_read:]
        return text

    def _take(self, text: str) -> str:
        if self._scanner is None:
            return text
        # Like end tokens, stop strings do not count before min_tokens; as in vLLM, they may begin there.
        found = self._scanner.feed(text, counts=self._num_tokens >= self._min_tokens)
        if found is not None:
            self.stop_string, num_read = found
            text = self._held + text[:num_read]
            self._held = ""
            return text if self._keeps_stop else text.removesuffix(self.stop_string)
        text = self._held + text
        certain = len(text) - self._scanner.num_held
        self._held = text[certain:]
        return text[:certain]
