"""Soft prompts among text, and the marks that stand for them while a chat template writes around them.

A template makes one string of a conversation. A soft prompt goes through it as a mark that nobody can guess,
drawn anew for each conversation; what the template made is then cut at the marks. So no text can stand for a soft
prompt, and none is lost, doubled or cut in half unnoticed. To the template a mark is a word: white space at its
sides is inside the message, and is not trimmed.
"""

import re
import secrets
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompt:
    """All virtual tokens of one adapter, which is spelled as users spell it."""

    adapter: str


# What a prompt becomes: ids of text, and soft prompts at their places.
Encoded = list[list[int] | SoftPrompt]


class Marks:
    """The soft prompts of one conversation, on their way through the template."""

    def __init__(self) -> None:
        # Private-use characters survive every normaliser and template filter, as in ControlTokens.
        self._nonce = secrets.token_hex(16)
        self._marked: list[SoftPrompt] = []

    def mark(self, soft_prompt: SoftPrompt) -> str:
        """What stands in its place until `cut`."""
        self._marked.append(soft_prompt)
        return f"\ue000{self._nonce}s{len(self._marked) - 1}\ue001"

    def cut(self, rendered: str) -> list[str | SoftPrompt]:
        """The texts and soft prompts of what a template made, in order; empty texts are left out.

        Raises InvalidArgument where the template has not written each soft prompt exactly once.
        """
        texts = re.split(f"\ue000{self._nonce}s[0-9]+\ue001", rendered)
        numbers = [int(number) for number in re.findall(f"\ue000{self._nonce}s([0-9]+)\ue001", rendered)]
        if sorted(numbers) != list(range(len(self._marked))) or any(self._nonce in text for text in texts):
            raise InvalidArgument(
                "the model's chat template leaves out a soft prompt of these messages, changes it or writes it "
                "twice; put it into another message, or in front of all by its name in model",
                field="messages",
            )
        parts: list[str | SoftPrompt] = [texts[0]]
        for number, text in zip(numbers, texts[1:], strict=True):
            parts += (self._marked[number], text)
        return [part for part in parts if part]
