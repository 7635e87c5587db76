"""Tools of an `LLM`'s conversations: the functions that may be called, and calls that were made."""

import json
from collections.abc import Mapping

from softprompt_api.errors import InvalidArgument
from softprompt_inference.text import ToolCall


def parse_calls(calls: object) -> tuple[ToolCall, ...]:
    """The calls of an assistant's message, `arguments` an object or its JSON; InvalidArgument for none."""
    if calls is None:
        return ()
    if not isinstance(calls, list | tuple):
        raise _no_call()
    return tuple(_parse_call(call) for call in calls)


def _parse_call(call: object) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _no_call()
    id_, name, arguments = call.get("id", ""), function.get("name"), function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json_text(arguments, what="the arguments of a call", field="messages")
    if not isinstance(id_, str) or not isinstance(name, str) or not isinstance(arguments, str):
        raise _no_call()
    return ToolCall(id=id_, name=name, arguments=arguments)


def json_text(value: Mapping[str, object], *, what: str, field: str) -> str:
    """An object as JSON; InvalidArgument where it has none."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()  # fails for lone surrogates, which no tokenizer takes
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} must be a JSON object: {error}", field=field) from None


def _no_call() -> InvalidArgument:
    return InvalidArgument(
        'tool_calls must be a list of {"id": …, "type": "function", "function": {"name": …, "arguments": …}}',
        field="messages",
    )
