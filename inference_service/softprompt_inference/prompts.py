"""What a request wants completed, and its ids."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar, cast

from softprompt_api.errors import InvalidArgument

from softprompt_inference.text import ChatMessage, Encoded, SoftPrompt, Tokenizer
from softprompt_inference.turns import Places

# More in one call would hold up everybody else: while many ids are copied, no other thread has the interpreter.
MAX_IDS = 2**20

Result = TypeVar("Result")


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
class PartsPrompt:
    """Texts, ids and soft prompts, in order.

    Neighbouring texts are one text; those on the two sides of anything else are encoded each on its own. Where the
    first part that is no soft prompt is a text, it has the tokenizer's own special tokens where asked for.
    """

    parts: Sequence[str | Sequence[int] | SoftPrompt]
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    `tools` is JSON of functions that may be called, `chat_template_kwargs` of values that the template reads.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[str] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: str = ""


Prompt = TextPrompt | IdsPrompt | PartsPrompt | ChatPrompt


def soft_prompts_in(prompt: Encoded) -> list[str]:
    """The adapters that stand inside a prompt, as they are spelled there, each once."""
    return list(dict.fromkeys(part.adapter for part in prompt if isinstance(part, SoftPrompt)))


def text_ids_of(prompt: Encoded) -> list[int]:
    """The ids of all text of a prompt."""
    texts = [part for part in prompt if isinstance(part, list)]
    return texts[0] if len(texts) == 1 else [token_id for text in texts for token_id in text]


def encode_parts(tokenizer: Tokenizer, prompt: PartsPrompt, *, max_tokens: int) -> Encoded:
    """The prompt as ids and soft prompts; ContextLengthExceeded where its text cannot fit in `max_tokens`."""
    parts = [part for part in prompt.parts if part != ""] or [""]
    num_characters = sum(len(part) for part in parts if isinstance(part, str))
    num_soft_prompts = sum(isinstance(part, SoftPrompt) for part in parts)
    num_ids = sum(len(part) for part in parts if not isinstance(part, str | SoftPrompt))
    tokenizer.check_size(num_characters, num_soft_prompts, num_ids=num_ids, max_tokens=max_tokens)
    encoded: Encoded = []
    adds_special_tokens = prompt.add_special_tokens  # to the next text
    for are_texts, group in groupby(parts, key=lambda part: isinstance(part, str)):
        if are_texts:
            text = "".join(cast(Iterable[str], group))
            new: Encoded = [tokenizer.encode(text, add_special_tokens=adds_special_tokens)]
        else:
            others = cast(Iterable[Sequence[int] | SoftPrompt], group)
            new = [part if isinstance(part, SoftPrompt) else list(part) for part in others]
        adds_special_tokens = adds_special_tokens and all(isinstance(part, SoftPrompt) for part in new)
        encoded += new
    return encoded


class PromptEncoder:
    """Prompts to ids, off the event loop.

    Args:
        tokenizer: the model's.
        vocab_size: ids of the model lie below it.
        max_tokens: longest prompt; longer ones are refused, where their size shows it without being encoded.
        executor: threads for encoding; their number bounds the processors it takes.
        num_threads: how many these are; tenants take turns for them.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, max_tokens: int, executor: Executor, num_threads: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._executor = executor
        self._turns = Places(num_threads)

    async def encode(self, prompt: Prompt, *, tenant: str = "") -> Encoded:
        """A prompt as ids of the vocabulary and soft prompts; InvalidArgument names what is wrong."""
        match prompt:
            case IdsPrompt(token_ids=token_ids):
                self._tokenizer.check_size(0, 0, num_ids=len(token_ids), max_tokens=self._max_tokens)
                return [self.check_ids(token_ids, field="token_ids")]
            case TextPrompt(text=text):
                parts = PartsPrompt(parts=[text], add_special_tokens=prompt.add_special_tokens)
                call = partial(encode_parts, self._tokenizer, parts, max_tokens=self._max_tokens)
            case PartsPrompt():
                call = partial(encode_parts, self._tokenizer, prompt, max_tokens=self._max_tokens)
            case ChatPrompt(messages=messages):
                call = partial(
                    self._tokenizer.encode_chat,
                    messages,
                    tools=prompt.tools,
                    add_generation_prompt=prompt.add_generation_prompt,
                    continue_final_message=prompt.continue_final_message,
                    chat_template_kwargs=prompt.chat_template_kwargs,
                    max_tokens=self._max_tokens,
                )
        async with self._turns.taken(tenant):
            return await self._run(partial(self._checked, call))

    def _checked(self, encode: Callable[[], Encoded]) -> Encoded:
        encoded = encode()
        return [self.check_ids(part, field="prompt") if isinstance(part, list) else part for part in encoded]

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        check_number_of_ids(len(token_ids), field="ids")
        ids = self.check_ids(token_ids, field="ids")
        return await self._run(partial(self._tokenizer.decode, ids))

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each id alone."""
        return await self._run(lambda: list(map(self._tokenizer.token_text, token_ids)))

    async def _run(self, call: Callable[[], Result]) -> Result:
        """What a call returns that may take long, made in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def check_ids(self, token_ids: Sequence[int], *, field: str) -> list[int]:
        """The ids as a list; InvalidArgument when one lies outside the vocabulary."""
        ids = list(token_ids)
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < self._vocab_size)
            raise InvalidArgument(
                f"{field} has id {wrong}; the vocabulary has ids 0 to {self._vocab_size - 1}", field=field
            )
        return ids


def check_number_of_ids(number: int, *, field: str) -> None:
    """Raise InvalidArgument where there are more ids than are taken, or told, at once."""
    if number > MAX_IDS:
        raise InvalidArgument(f"there are {number} ids; at most {MAX_IDS} can be had at once", field=field)
