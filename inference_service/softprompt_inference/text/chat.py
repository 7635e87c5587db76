"""Conversations to prompt ids, through the model's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.names import shown

from softprompt_inference.text.control import ControlTokens
from softprompt_inference.text.soft_prompts import Encoded, Marks, SoftPrompt
from softprompt_inference.text.template import ChatTemplate
from softprompt_inference.text.tools import ToolCall, Turn, in_words, map_texts, parse_call, parse_tool

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2048
MAX_NAME_CHARACTERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn. `role` is one of ROLES; `name` and `tool_call_id` are optional and given to the template.

    `content` is a text, or texts and soft prompts in order.
    """

    role: str
    content: str | Sequence[str | SoftPrompt]
    name: str = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""

    @property
    def parts(self) -> Sequence[str | SoftPrompt]:
        """Its content, part by part."""
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The text of its content."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def num_soft_prompts(self) -> int:
        """How many soft prompts stand in its content."""
        return sum(isinstance(part, SoftPrompt) for part in self.parts)


class ChatEncoder:
    """Renders conversations and encodes them; special tokens spelled in messages stay plain text.

    Args:
        template: None: the model has none.
        control: tells the template's control tokens from the messages' text.
    """

    def __init__(self, template: ChatTemplate | None, control: ControlTokens) -> None:
        self._template = template
        self._control = control

    def encode(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[str] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: str = "",
    ) -> Encoded:
        """Ids of a conversation, and soft prompts between them; InvalidArgument names what cannot be taken.

        Text on the two sides of a soft prompt is encoded each on its own.
        """
        check_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidArgument(
                "continue_final_message continues the last message; set add_generation_prompt to false with it",
                field="continue_final_message",
            )
        if self._template is None:
            raise Unsupported(
                "the model has no chat template, so it takes no messages; send the text as a prompt instead",
                field="messages",
            )
        values = {
            name: map_texts(value, self._control.shield)
            for name, value in self._template.parse_values(chat_template_kwargs).items()
        }
        marks = Marks()
        turns = [self._shielded(message, marks) for message in messages]
        told: list[dict[str, Any]] = [map_texts(parse_tool(tool), self._control.shield) for tool in tools]
        if not self._template.knows_tools and (told or any("tool_calls" in turn for turn in turns)):
            turns, told = in_words(turns, told), []
        try:
            rendered = self._template.render(
                turns,
                tools=told,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                values=values,
            )
        except TemplateError as error:  # also what a template refuses by itself, such as roles out of order
            raise InvalidArgument(
                f"the model's chat template refuses the messages{_reason(error)}", field="messages"
            ) from error
        except Exception as error:  # a template is foreign code, and can fail in any way over what it is given
            raise InvalidArgument(
                "the model's chat template cannot render these messages; see the model's card for what it takes",
                field="messages",
            ) from error
        return [self._control.encode(part) if isinstance(part, str) else part for part in marks.cut(rendered)]

    def _shielded(self, message: ChatMessage, marks: Marks) -> Turn:
        shield = self._control.shield
        role = "system" if message.role == "developer" else message.role
        parts = [shield(part) if isinstance(part, str) else marks.mark(part) for part in message.parts]
        turn: Turn = {"role": role, "content": "".join(parts)}
        if message.name:
            turn["name"] = shield(message.name)
        if message.tool_call_id:
            turn["tool_call_id"] = shield(message.tool_call_id)
        if message.tool_calls:
            turn["tool_calls"] = [map_texts(parse_call(call), shield) for call in message.tool_calls]
        return turn


def _reason(error: TemplateError) -> str:
    """The template's own words, unless they repeat marks: whoever knows those can write control tokens."""
    words = str(error)
    return "" if "\ue000" in words or "\ue001" in words else f": {words[:200]}"


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise InvalidArgument for a conversation that no template is asked about."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidArgument(
            f"a conversation has 1 to {MAX_MESSAGES} messages; there are {len(messages)}", field="messages"
        )
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgument(
                f"{shown(message.role)} is no role; roles are {', '.join(ROLES)}", field=f"messages[{number}].role"
            )
        if len(message.name) > MAX_NAME_CHARACTERS:
            raise InvalidArgument(
                f"a name has at most {MAX_NAME_CHARACTERS} characters", field=f"messages[{number}].name"
            )
