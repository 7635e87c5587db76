"""What a request wants completed, and its ids."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from softprompt_api.errors import InvalidArgument

from softprompt_inference.text import ChatMessage, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Text; the tokenizer's own special tokens (BOS) are added where asked for."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class IdsPrompt:
    """Token ids, taken as they are."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template; `tools` is JSON of functions that may be called."""

    messages: Sequence[ChatMessage]
    tools: Sequence[str] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False


Prompt = TextPrompt | IdsPrompt | ChatPrompt


class PromptEncoder:
    """Prompts to ids, off the event loop.

    Args:
        tokenizer: the model's.
        vocab_size: ids of the model lie below it.
        max_tokens: longest prompt; longer ones are refused, where their size shows it without being encoded.
        executor: threads for encoding; their number bounds the processors it takes.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, max_tokens: int, executor: Executor) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._executor = executor

    async def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, all of them in the vocabulary; InvalidArgument names what is wrong."""
        match prompt:
            case IdsPrompt(token_ids=token_ids):
                return self.check_ids(token_ids, field="token_ids")
            case TextPrompt(text=text):
                call = partial(
                    self._tokenizer.encode,
                    text,
                    add_special_tokens=prompt.add_special_tokens,
                    max_tokens=self._max_tokens,
                )
            case ChatPrompt(messages=messages):
                call = partial(
                    self._tokenizer.encode_chat,
                    messages,
                    tools=prompt.tools,
                    add_generation_prompt=prompt.add_generation_prompt,
                    continue_final_message=prompt.continue_final_message,
                    max_tokens=self._max_tokens,
                )
        ids = await asyncio.get_running_loop().run_in_executor(self._executor, call)
        return self.check_ids(ids, field="prompt")

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        ids = self.check_ids(token_ids, field="ids")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._tokenizer.decode, ids)

    def check_ids(self, token_ids: Sequence[int], *, field: str) -> list[int]:
        """The ids as a list; InvalidArgument when one lies outside the vocabulary."""
        ids = list(token_ids)
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
            raise InvalidArgument(
                f"{field} has id {wrong}; the vocabulary has ids 0 to {self._vocab_size - 1}", field=field
            )
        return ids
