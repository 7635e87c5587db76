"""A prompt of an `LLM` with the adapters that it runs with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from softprompt_api.composition import Part, check_front, check_inside, check_number
from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import Role
from softprompt_inference.engine.messages import SoftPromptPart, TextPart
from softprompt_inference.prompts import text_ids_of
from softprompt_inference.text import ChatMessage, Encoded, SoftPrompt

from softprompt.requests import LoRARequest, PromptAdapterRequest
from softprompt.tools import parse_calls

Message = Mapping[str, object]
_MEMBERS = {"role", "content", "name", "tool_calls", "tool_call_id"}
# What one prompt may run with: nothing, a soft prompt, or several in front of it, in order.
SoftPrompts = PromptAdapterRequest | Sequence[PromptAdapterRequest] | None


class Places:
    """The soft prompts inside one prompt, by the names under which they go through the tokenizer."""

    def __init__(self) -> None:
        self.requests: dict[str, PromptAdapterRequest] = {}

    def place(self, request: PromptAdapterRequest) -> SoftPrompt:
        """What stands for a request until the prompt is encoded."""
        name = str(len(self.requests))
        self.requests[name] = request
        return SoftPrompt(adapter=name)

    def message(self, message: Message) -> ChatMessage:
        """A turn of a conversation: its content is a text, or a list of texts and soft prompts."""
        if not isinstance(message, Mapping) or "role" not in message or not set(message) <= _MEMBERS:
            raise InvalidArgument("each message must be {'role': …, 'content': …}", field="messages")
        role, name, call_id = message["role"], message.get("name", ""), message.get("tool_call_id", "")
        calls = parse_calls(message.get("tool_calls"))
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [] if content is None and calls else content
        words = (role, name, call_id)
        if not all(isinstance(word, str) for word in words) or not isinstance(parts, list | tuple):
            raise InvalidArgument(
                "a message's role, name and tool_call_id must be strings, and its content a string or a list of "
                "parts; only beside tool_calls it may be absent",
                field="messages",
            )
        return ChatMessage(
            role=str(role),
            name=str(name),
            content=self._content(parts),
            tool_calls=calls,
            tool_call_id=str(call_id),
        )

    def _content(self, parts: Sequence[object]) -> Sequence[str | SoftPrompt]:
        content: list[str | SoftPrompt] = []
        for part in parts:
            if isinstance(part, PromptAdapterRequest):
                content.append(self.place(part))
            else:
                # As over HTTP: neighbouring texts are lines.
                line_break = "\n" if content and isinstance(content[-1], str) else ""
                content.append(line_break + _text_of(part))
        return content


def _text_of(part: object) -> str:
    if isinstance(part, Mapping) and set(part) == {"type", "text"} and part["type"] == "text":
        part = part["text"]
    if not isinstance(part, str):
        raise InvalidArgument(
            "a part of a message must be a string, {'type': 'text', 'text': …} or a PromptAdapterRequest",
            field="messages",
        )
    return part


def several(value: SoftPrompts) -> tuple[PromptAdapterRequest, ...]:
    """The soft prompts in front of one prompt, in order."""
    requests = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(request, PromptAdapterRequest) for request in requests):
        raise InvalidArgument(
            "prompt_adapter_request must be a PromptAdapterRequest, or a list that has one, several in a list, "
            "or None for each prompt",
            field="prompt_adapter_request",
        )
    return requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A prompt with its adapters.

    Attributes:
        text: the prompt's text, without virtual tokens; None where it has token ids.
        encoded: its ids, and soft prompts by their names in `inside`.
        given: the soft prompts in front of it, as the caller gave them.
        lora: what computes it.
    """

    text: str | None
    encoded: Encoded
    inside: Mapping[str, PromptAdapterRequest]
    given: SoftPrompts
    lora: LoRARequest | None

    @property
    def text_ids(self) -> list[int]:
        """The ids of its text."""
        return text_ids_of(self.encoded)

    @property
    def soft_prompts(self) -> list[PromptAdapterRequest]:
        """Those in front, then those inside."""
        return [*several(self.given), *self.inside.values()]

    def parts(self, digests: Mapping[PromptAdapterRequest, str]) -> list[TextPart | SoftPromptPart]:
        """The prompt as the engine takes it; `digests` of its soft prompts."""
        parts: list[TextPart | SoftPromptPart] = [
            SoftPromptPart(digest=digests[request]) for request in several(self.given)
        ]
        for part in self.encoded:
            if isinstance(part, SoftPrompt):
                parts.append(SoftPromptPart(digest=digests[self.inside[part.adapter]]))
            else:
                parts.append(TextPart(token_ids=part))
        return parts

    def check(self, role_of: Callable[[PromptAdapterRequest], Role]) -> None:
        """Raise InvalidArgument for too many adapters, and where a soft prompt cannot stand where it does."""
        front = [Part(name=repr(one.name), role=role_of(one)) for one in several(self.given)]
        inside = [Part(name=repr(one.name), role=role_of(one)) for one in self.inside.values()]
        number = len(front) + len(set(self.inside.values())) + (self.lora is not None)
        check_number(number, field="prompt_adapter_request")
        check_front(front, field="prompt_adapter_request")
        check_inside(inside, field="prompt")
