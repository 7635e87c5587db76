"""The model's tokenizer: prompts to ids, ids to text, and what else a service must know of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from softprompt_api.errors import ContextLengthExceeded, InvalidArgument
from softprompt_api.params import SamplingParams
from tokenizers import Tokenizer as Backend

from softprompt_inference.text.chat import ChatEncoder, ChatMessage
from softprompt_inference.text.control import ControlTokens
from softprompt_inference.text.definition import read_definition
from softprompt_inference.text.detokenizer import OutputText
from softprompt_inference.text.soft_prompts import Encoded
from softprompt_inference.text.template import ChatTemplate
from softprompt_inference.text.vocabulary import Vocabulary


class Tokenizer:
    """A tokenizer with its chat template. Calls are safe from several threads and keep the interpreter free.

    Attributes:
        sha256: hex digest of the serialised tokenizer, part of the model's fingerprint.
        eos_token_ids: every id that ends a sequence, sorted.
    """

    def __init__(self, backend: Backend, template: ChatTemplate | None, eos_token_ids: Sequence[int]) -> None:
        backend.no_truncation()
        backend.no_padding()
        serialized = backend.to_str()
        self._backend = backend
        self._vocabulary = Vocabulary(backend, serialized)
        self._chat = ChatEncoder(template, ControlTokens(serialized))
        self.sha256 = hashlib.sha256(serialized.encode()).hexdigest()
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """The tokenizer of a local model folder; Unsupported where it has none that can be used."""
        definition = read_definition(Path(folder))
        template = definition.chat_template
        return cls(
            Backend.from_str(definition.serialized),
            None if template is None else ChatTemplate(template, definition.special_tokens),
            definition.eos_token_ids,
        )

    def ends_below(self, vocab_size: int) -> list[int]:
        """The ids that end a sequence; not those beyond a model's logits, which files may name too."""
        return [token_id for token_id in self.eos_token_ids if token_id < vocab_size]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Special tokens spelled in it are special.

        Args:
            add_special_tokens: add what the tokenizer adds by itself, such as BOS.
        """
        _check_unicode(text, field="prompt")
        # Only the batch call releases the interpreter lock.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[str] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: str = "",
        max_tokens: int | None = None,
    ) -> Encoded:
        """A conversation as ids, and soft prompts between them.

        Special tokens in messages and tools are plain text.

        Args:
            tools: JSON of the functions that may be called.
            chat_template_kwargs: a JSON object of values that the chat template reads; empty: none.
            max_tokens: refuse what cannot fit in so many without encoding it (ContextLengthExceeded).
        """
        calls = [call for message in messages for call in message.tool_calls]
        texts = [message.text for message in messages] + [call.arguments for call in calls]
        num_soft_prompts = sum(message.num_soft_prompts for message in messages)
        self.check_size(sum(map(len, (*texts, *tools))), num_soft_prompts, max_tokens=max_tokens)
        texts += [message.name + message.tool_call_id for message in messages]
        texts += [call.id + call.name for call in calls]
        _check_unicode("".join(texts), field="messages")
        return self._chat.encode(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids as a whole; ids that the tokenizer does not have are left out."""
        texts: list[str] = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def output_text(self, params: SamplingParams) -> OutputText:
        """A detokenizer for one choice."""
        return OutputText(self._vocabulary, params)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; empty for an id the tokenizer does not have."""
        return self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """Text of one token, replacement characters where it is not whole UTF-8."""
        return self._vocabulary.token_text(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether texts leave the token out unless they are asked to have special tokens."""
        return token_id in self._vocabulary.special_ids

    def check_size(
        self, num_characters: int, num_soft_prompts: int, *, num_ids: int = 0, max_tokens: int | None
    ) -> None:
        """Raise ContextLengthExceeded where so much must have more tokens than that."""
        if max_tokens is None:
            return
        least = -(-num_characters // self._vocabulary.max_token_characters) + num_soft_prompts + num_ids
        if least > max_tokens:
            counts = {"characters": num_characters, "ids": num_ids, "soft prompts": num_soft_prompts}
            held = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
            raise ContextLengthExceeded(
                f"the prompt has {held}, which are at least {least} tokens; the limit is {max_tokens}",
                field="prompt",
            )


def _check_unicode(text: str, *, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument("the text holds a lone surrogate, which is no character", field=field) from error
