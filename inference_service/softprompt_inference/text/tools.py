"""Functions that an assistant may call: for templates that know them, and in words of ours for others.

A call is a JSON object {"name", "arguments"} between <tool_call> and </tool_call>, as models of the Hermes and
Qwen families write it. A template is asked to tell of functions where it has that spelling; otherwise the
conversation is rewritten to one of plain turns:

* the functions, and how to call them, stand at the end of the system message;
* an assistant's calls stand behind its content;
* results are the user's turns, between <tool_response> and </tool_response>.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from softprompt_api.errors import InvalidArgument
from softprompt_api.structured import parse_object

CALL_START, CALL_END = "<tool_call>", "</tool_call>"

Turn = dict[str, Any]
_KEYS = frozenset(
    (
        "type",
        "function",
        "name",
        "description",
        "parameters",
        "strict",
        "id",
        "arguments",
        "properties",
        "required",
    )
)

# As Qwen's template says it.
_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that an assistant made. `arguments` is a JSON object as text, or whatever the model wrote instead."""

    id: str
    name: str
    arguments: str


def are_told_by(template: str) -> bool:
    """Whether a chat template tells of functions, and wants calls spelled as they are read here."""
    return "tools" in template and CALL_START in template


def parse_tool(text: str) -> dict[str, Any]:
    """A function as its JSON object; InvalidArgument where it is none."""
    tool = parse_object(text, what="a tool", field="tools")
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
        raise InvalidArgument('a tool must be {"type": "function", "function": {"name", …}}', field="tools")
    return tool


def parse_call(call: ToolCall) -> dict[str, Any]:
    """A call as templates take it: its arguments as an object, or as they are where they are no such text."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}


def _arguments(call: ToolCall) -> dict[str, Any] | str:
    if not call.arguments.strip():
        return {}
    try:
        return parse_object(call.arguments, what="the arguments of a call", field="messages")
    except InvalidArgument:  # a model wrote them, which may have erred; many templates take texts too
        return call.arguments


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, and every key that a template does not look for."""
    match value:
        case str():
            return change(value)
        case dict():
            return {
                key if key in _KEYS else change(key): map_texts(member, change) for key, member in value.items()
            }
        case list():
            return [map_texts(member, change) for member in value]
        case _:
            return value


def in_words(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The conversation for a template that knows no functions."""
    plain: list[Turn] = []
    for are_results, group in groupby(turns, key=lambda turn: turn["role"] == "tool"):
        if are_results:
            responses = [f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in group]
            plain.append({"role": "user", "content": "\n".join(responses)})
        else:
            plain += map(_in_words, group)
    return _with_system(plain, tools) if tools else plain


def _in_words(turn: Turn) -> Turn:
    calls = [_call_text(call["function"]) for call in turn.get("tool_calls", ())]
    content = [turn["content"]] if turn["content"] or not calls else []
    rest = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
    return {**rest, "content": "\n".join([*content, *calls])}


def _call_text(function: Mapping[str, Any]) -> str:
    return f"{CALL_START}\n{_dump({key: function[key] for key in ('name', 'arguments')})}\n{CALL_END}"


def _with_system(turns: list[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    text = _SYSTEM.format(tools="\n".join(map(_dump, tools)))
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
