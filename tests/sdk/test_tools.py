"""Tools and calls as OpenAI spells them, read for the tokenizer."""

from typing import Any

import pytest
from softprompt.tools import json_text, parse_calls
from softprompt_api.errors import InvalidArgument
from softprompt_inference.text import ToolCall

CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}


def test_a_tool_is_told_as_its_json() -> None:
    tool = {"type": "function", "function": {"name": "ü"}}
    assert json_text(tool, what="a tool", field="tools") == '{"type": "function", "function": {"name": "ü"}}'


def test_arguments_may_be_an_object_or_its_json() -> None:
    expected = ToolCall(id="1", name="f", arguments='{"a": "ü"}')
    assert parse_calls([CALL]) == (expected,)
    assert parse_calls(({**CALL, "function": {"name": "f", "arguments": {"a": "ü"}}},)) == (expected,)
    assert parse_calls(None) == parse_calls([]) == ()


@pytest.mark.parametrize(
    "calls",
    [
        "x",
        {},
        [1],
        [{"id": "1"}],
        [{**CALL, "id": 1}],
        [{**CALL, "function": {"name": "f"}}],
        [{**CALL, "function": {"name": 5, "arguments": "{}"}}],
        [{**CALL, "function": {"name": "f", "arguments": {"a": {1}}}}],
        [{**CALL, "function": {"name": "f", "arguments": {"a": "\ud800"}}}],
    ],
)
def test_what_is_no_call_is_refused(calls: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_calls(calls)
    assert refused.value.field == "messages"


def test_a_tool_without_json_is_refused() -> None:
    for tool in ({"a": {1}}, {"a": "\ud800"}):
        with pytest.raises(InvalidArgument) as refused:
            json_text(tool, what="a tool", field="tools")
        assert refused.value.field == "tools"
