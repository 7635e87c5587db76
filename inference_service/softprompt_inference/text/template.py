"""The model's chat template, and what it reads beside the conversation: `{"enable_thinking": false}`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt_api.errors import InvalidArgument
from softprompt_api.names import shown
from softprompt_api.structured import parse_object

from softprompt_inference.text.tools import Turn, are_told_by

MAX_VALUES_CHARACTERS = 16384

_VALUES = "chat_template_kwargs"
_NAME = re.compile(r"[^\W\d]\w*")
# What every template is handed, or is told of by fields of their own.
_OWN = frozenset(
    (
        *("conversations", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    )
)


class ChatTemplate:
    """Renders conversations as transformers' `apply_chat_template` does, in its sandbox, without its tokenizer.

    Args:
        source: Jinja.
        special_tokens: what it calls them → how they are spelled: {"bos_token": "<s>", …}.

    Attributes:
        knows_tools: whether it tells of functions that may be called.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        # Most of a second to import, and nothing else here needs it: a service can listen before.
        from transformers.utils.chat_template_utils import render_jinja_template

        self.knows_tools = are_told_by(source)
        self._render = render_jinja_template
        self._source = source
        self._special_tokens = special_tokens or {}
        self._names = frozenset(_NAME.findall(source))  # those of its variables are among them

    def parse_values(self, text: str) -> dict[str, Any]:
        """The values of a JSON object ("": none) that it reads, by name; InvalidArgument: it would not read one.

        What asks for nothing (`null`, `false`, 0, and what is empty) may be said to a template that does not know
        of it, since clients say so to every model, and is left out then.
        """
        if not text:
            return {}
        if len(text) > MAX_VALUES_CHARACTERS:
            raise _wrong(f"has {len(text)} characters as JSON; at most {MAX_VALUES_CHARACTERS} are taken")
        values = parse_object(text, what=_VALUES, field=_VALUES)
        for name, value in values.items():
            if name in _OWN or name in self._special_tokens:
                raise _wrong(f"cannot set {shown(name)}, which the request or the model says elsewhere")
            if value and name not in self._names:
                raise _wrong(f"sets {shown(name)}, which the model's chat template does not read")
        return {name: value for name, value in values.items() if name in self._names}

    def render(
        self,
        messages: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as one text; raises whatever foreign code can."""
        rendered, _ = self._render(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **self._special_tokens,
            **(values or {}),
        )
        return str(rendered[0])


def _wrong(what: str) -> InvalidArgument:
    return InvalidArgument(f"{_VALUES} {what}", field=_VALUES)
