"""The grammars of calls, compiled for a real tokenizer: what may come, and what not."""

from collections.abc import Callable
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.structured import StructuredOutputsParams
from softprompt_gateway.openai.tools import Tool, ToolChoice, grammar_of
from softprompt_inference.grammar import GrammarCompiler
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import Tokenizer
from softprompt_inference.text.definition import read_definition

VOCAB_SIZE = 49152
EOS = 2


def function(name: str, *, strict: bool = False, **properties: Any) -> Tool:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "$defs": {"number": {"type": "integer"}},
    }
    return Tool.checked(
        {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}
    )


ADD = function("add", a={"$ref": "#/$defs/number"}, b={"type": "integer"})
STRICT_ADD = function("add", strict=True, a={"$ref": "#/$defs/number"}, b={"type": "integer"})
ADDRESS = function("address", street={"type": "string", "pattern": "^[a-z]+$"})
PLAIN = Tool.checked({"type": "function", "function": {"name": "plain"}})


def open_function(**parameters: Any) -> Tool:
    """A function whose schema leaves open whether there are further parameters."""
    return Tool.checked({"type": "function", "function": {"name": "open", "parameters": parameters}})


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


RIGHT = call("add", '{"a": 1, "b": -2}')
WRONG = call("add", '{"a": "x"}')
STREET = call("address", '{"street": "abc"}')


@pytest.fixture(scope="module")
def may_come() -> Callable[[str, str], bool]:
    """Whether a text is one of a grammar, to its end."""
    folder = resolve_model(DEFAULT_MODEL)
    definition, tokenizer = read_definition(folder), Tokenizer.load(folder)
    compiler = GrammarCompiler(lambda: definition, vocab_size=VOCAB_SIZE)

    def follows(grammar: str, text: str) -> bool:
        matcher = compiler.compile(StructuredOutputsParams(grammar=grammar))
        for token_id in [*tokenizer.encode(text), EOS]:
            if not matcher.allowed(())[token_id >> 3] >> (token_id & 7) & 1:
                return False
            matcher.accept(token_id)
        return True

    return follows


def lark(choice: ToolChoice | None, *tools: Tool, parallel: bool = True) -> str:
    grammar = grammar_of(tools, choice, parallel=parallel)
    assert grammar is not None
    return grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, True),
        (STREET, True),
        (f"{RIGHT}\n{STREET}\n{RIGHT}", True),
        (call("plain", '{"any": [1, {"thing": null}]}'), True),
        (call("plain", "{}"), True),
        ("", False),
        ("Hello", False),
        (f"Hello {RIGHT}", False),
        (f"{RIGHT} bye", False),
        (WRONG, False),
        (call("address", '{"street": "ABC"}'), False),
        (call("add", '{"street": "abc"}'), False),
        (call("other", "{}"), False),
        (call("plain", "[]"), False),
        (RIGHT.removesuffix("</tool_call>"), False),
    ],
)
def test_required_calls_are_calls_and_nothing_else(
    may_come: Callable[[str, str], bool], text: str, expected: bool
) -> None:
    assert may_come(lark("required", ADD, ADDRESS, PLAIN), text) is expected


@pytest.mark.parametrize(("text", "expected"), [(RIGHT, True), (f"{RIGHT}\n{RIGHT}", False)])
def test_a_single_call_stays_one(may_come: Callable[[str, str], bool], text: str, expected: bool) -> None:
    assert may_come(lark("required", ADD, parallel=False), text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("Hello, 3 < 4 and <tool> is no call.", True),
        (RIGHT, True),
        (f"Let me see.\n{RIGHT}\n{STREET}", True),
        (f"{RIGHT} That is it.", True),
        (call("address", '{"street": "ABC", "more": 1}'), True),  # not strict: any object
        (WRONG, False),
        (f"Let me see.\n{WRONG}", False),
        (f"{RIGHT}\n{WRONG}", False),
        ("<tool_call>nonsense</tool_call>", False),
        (call("other", "{}"), False),
        (call("address", "5"), False),
    ],
)
def test_text_is_free_and_strict_calls_in_it_are_right(
    may_come: Callable[[str, str], bool], text: str, expected: bool
) -> None:
    assert may_come(lark("auto", STRICT_ADD, ADDRESS), text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Hello", True), (f"Hello {RIGHT}", True), (f"{RIGHT}\n{RIGHT}", False), (f"{RIGHT} Hello", False)],
)
def test_where_one_call_may_come_it_is_the_last_word(
    may_come: Callable[[str, str], bool], text: str, expected: bool
) -> None:
    assert may_come(lark(None, ADD, parallel=False), text) is expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?=x)y"},
        {"type": "robot"},
        {"$ref": "#/$defs/nothing"},
        {"type": "string", "pattern": "(a{1000}){1000}"},
        {"$ref": "http://127.0.0.1:1/x.json"},
    ],
)
def test_functions_that_no_call_can_follow_are_refused(
    may_come: Callable[[str, str], bool], schema: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument):
        may_come(lark("required", function("f", a=schema)), "")


@pytest.mark.parametrize(
    ("parameters", "arguments", "may"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', True),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1, "b": 2}', False),
        ({"properties": {}}, "{}", True),
        ({"properties": {}}, '{"a": 1}', False),
        ({}, '{"a": 1}', True),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"a": 1, "b": 2}', True),
        ({"properties": {"a": {"type": "integer"}}, "required": ["b"]}, '{"a": 1, "b": 2}', True),
        ({"properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["b"]}]}, '{"a": 1, "b": 2}', True),
    ],
)
def test_parameters_that_are_not_listed_come_only_where_the_schema_wants_some(
    may_come: Callable[[str, str], bool], parameters: dict[str, Any], arguments: str, may: bool
) -> None:
    grammar = grammar_of([open_function(type="object", **parameters)], "required", parallel=False)
    assert grammar is not None
    assert may_come(grammar, call("open", arguments)) == may
