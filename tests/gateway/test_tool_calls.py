"""Calls are told from text, however the text is cut into pieces."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_gateway.openai.tool_calls import CallReader

NAMES = {"f", "get_weather"}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}\\"</tool_call>"}]}}\n</tool_call>'
OPEN_CALL = CALL.removesuffix("</tool_call>")
ARGUMENTS = '{"a": [1, {"b": "}\\"</tool_call>"}]}'


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and name and arguments of each call."""
    reader, text = CallReader(NAMES), ""
    calls: list[list[str]] = []
    ids: list[str] = []
    has_ended = True
    for said in [*map(reader.read, pieces), reader.finish()]:
        text += said.text
        for piece in said.calls:
            assert bool(piece.name) or not has_ended, "nothing follows the last piece"
            has_ended = piece.is_last
            if piece.name:
                assert piece.index == len(calls)
                ids.append(piece.id)
                calls.append([piece.name, piece.arguments])
            else:
                assert piece.index == len(calls) - 1
                assert not piece.id
                calls[-1][1] += piece.arguments
    assert reader.num_calls == len(calls) == len(set(ids))
    return text, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(
    ("output", "text", "calls"),
    [
        ("", "", []),
        ("plain text\n", "plain text\n", []),
        (" \n ", " \n ", []),
        (CALL, "", [("f", ARGUMENTS)]),
        (f"{CALL}\n{CALL}\n", "", [("f", ARGUMENTS)] * 2),
        (f"Let me see.\n{CALL}", "Let me see.", [("f", ARGUMENTS)]),
        (f"One{CALL} two", "One two", [("f", ARGUMENTS)]),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"arguments": {"x": "ü"}, "name": "f"}</tool_call>', "", [("f", '{"x": "ü"}')]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}', "", [("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"x": ', "", [("f", '{"x": ')]),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', None, []),
        ('<tool_call>{"name": "f"}</tool_call> x', None, []),
        ("<tool_call>not JSON</tool_call>", None, []),
        ("<tool_call>[1]</tool_call>", None, []),
        ("<tool_call>" + "[" * 3000 + "</tool_call>", None, []),
        ("a < b <tool <tool_cal", None, []),
        ("<tool_call><tool_call></tool_call>", None, []),
        ('<tool_call>{"name":"f","arguments":{}}\nThe answer is 5.\n', "The answer is 5.", [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":{}} </tool_', "", [("f", "{}")]),
        (
            '<tool_call>{"name":"f","arguments":{}}\n<tool_call>{"name":"get_weather","arguments":{}}</tool_call>',
            "",
            [("f", "{}"), ("get_weather", "{}")],
        ),
        (f'<tool_call>{{"name":"f","arguments":{{}}}} and {CALL}', "and", [("f", "{}"), ("f", ARGUMENTS)]),
    ],
)
def test_an_output_is_text_and_calls(output: str, text: str | None, calls: list[tuple[str, str]]) -> None:
    expected = (output if text is None else text, calls)
    assert read([output]) == expected
    assert read(list(output)) == expected


@given(
    parts=st.lists(
        st.sampled_from([CALL, OPEN_CALL, "text", " ", "\n", "<tool_call>", "</tool_call>", "{", "<", "ü🦜"])
    ),
    cuts=st.lists(st.integers(0, 400)),
)
def test_it_does_not_matter_how_the_output_is_cut(parts: list[str], cuts: list[int]) -> None:
    output = "".join(parts)
    edges = sorted({0, len(output), *(cut for cut in cuts if cut < len(output))})
    pieces = [output[start:stop] for start, stop in pairwise(edges)]
    assert read(pieces) == read([output])


def in_order(pieces: list[str]) -> list[tuple[str, str]]:
    """Texts, and names with whole arguments, as they follow each other."""
    reader = CallReader(NAMES)
    told: list[tuple[str, str]] = []
    for said in [*map(reader.read, pieces), reader.finish()]:
        for piece in said.pieces:
            if isinstance(piece, str):
                is_further = bool(told) and not told[-1][0]
                name, text = "", piece
            else:
                is_further, name, text = not piece.name, piece.name, piece.arguments
            if is_further:
                name, before = told.pop()
                text = before + text
            told.append((name, text))
    return told


def test_texts_and_calls_are_told_in_their_order() -> None:
    output = f"One {CALL} two{CALL}{CALL}\nthree"
    call = ("f", ARGUMENTS)
    expected = [("", "One"), call, ("", " two"), call, call, ("", "\nthree")]
    assert in_order([output]) == expected
    assert in_order(list(output)) == expected


def test_a_call_has_ended_with_its_arguments() -> None:
    reader = CallReader(NAMES)
    [piece] = reader.read('<tool_call>{"name": "f", "arguments": {"a": 1').calls
    assert not piece.is_last
    [piece] = reader.read("}").calls
    assert piece.is_last
    [piece] = CallReader(NAMES).read('<tool_call>{"arguments": {}, "name": "f"}</tool_call>').calls
    assert piece.is_last


def test_a_call_is_told_by_its_name_before_its_arguments_are_there() -> None:
    reader = CallReader(NAMES)
    assert not reader.read('<tool_call>{"name": "get_wea').calls
    [first] = reader.read('ther", "arguments": {"ci').calls
    assert (first.index, first.name, first.arguments) == (0, "get_weather", '{"ci')
    assert first.id.startswith("call_")
    [second] = reader.read('ty": "Paris"}}').calls
    assert (second.index, second.name, second.id, second.arguments) == (0, "", "", 'ty": "Paris"}')
    assert json.loads(first.arguments + second.arguments) == {"city": "Paris"}


def test_text_is_told_as_soon_as_it_cannot_be_a_call() -> None:
    reader = CallReader(NAMES)
    assert reader.read("Hello <tool").text == "Hello"
    assert reader.read("box> yes").text == " <toolbox> yes"
