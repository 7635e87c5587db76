"""What a request wants its output to be reaches the inference service, and what is none is refused by name."""

from typing import Any

import openai
import pydantic
import pytest
from softprompt_api.inference.v1 import inference_pb2 as pb

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SCHEMA_TEXT = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def grammar(stack: Any) -> pb.Grammar:
    return stack.inference.requests[-1].sampling.grammar


FORMS = [
    ({"json": SCHEMA}, pb.Grammar(json_schema=SCHEMA_TEXT)),
    ({"json": SCHEMA_TEXT, "regex": None}, pb.Grammar(json_schema=SCHEMA_TEXT)),
    ({"regex": "a+"}, pb.Grammar(regex="a+")),
    ({"choice": ["a", "b"]}, pb.Grammar(choice=pb.Choices(texts=["a", "b"]))),
    ({"grammar": "start: /a/"}, pb.Grammar(lark="start: /a/")),
    ({"json_object": True}, pb.Grammar(json_object=True)),
]


@pytest.mark.parametrize(("form", "expected"), FORMS)
async def test_both_routes_pass_it_on(stack: Any, form: Any, expected: pb.Grammar) -> None:
    assert (await stack.complete("x", structured_outputs=form)).status_code == 200
    assert grammar(stack) == expected
    assert (await stack.chat("x", structured_outputs=form)).status_code == 200
    assert grammar(stack) == expected


@pytest.mark.parametrize(
    ("name", "value", "member"),
    [
        ("guided_json", SCHEMA, "json"),
        ("guided_regex", "a+", "regex"),
        ("guided_choice", ["a"], "choice"),
        ("guided_grammar", "start: /a/", "grammar"),
    ],
)
async def test_older_names_mean_the_same_and_are_logged(
    stack: Any, logged: list[Any], name: str, value: Any, member: str
) -> None:
    await stack.complete("x", structured_outputs={member: value})
    expected = grammar(stack)
    assert (await stack.complete("x", **{name: value})).status_code == 200
    assert grammar(stack) == expected
    [event] = [event for event in logged if event["event"] == "old field name"]
    assert (event["field"], event["instead"]) == (name, f"structured_outputs.{member}")


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "json_object"}, pb.Grammar(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            pb.Grammar(json_schema=SCHEMA_TEXT),
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "description": "y"}},
            pb.Grammar(json_schema=SCHEMA_TEXT),
        ),
    ],
)
async def test_a_response_format_is_such_a_form(stack: Any, response_format: Any, expected: pb.Grammar) -> None:
    assert (await stack.chat("x", response_format=response_format)).status_code == 200
    assert grammar(stack) == expected


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
async def test_without_a_form_there_is_no_grammar(stack: Any, fields: Any) -> None:
    await stack.chat("x", **fields)
    assert not stack.inference.requests[-1].sampling.HasField("grammar")


class Answer(pydantic.BaseModel):
    a: int


async def test_openais_client_parses_into_a_model(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": '{"a": 5}'}]
    answer = await sdk.chat.completions.parse(model=stack.base, messages=messages, response_format=Answer)
    assert answer.choices[0].message.parsed == Answer(a=5)
    assert grammar(stack).json_schema


async def test_openais_client_parses_a_stream(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": '{"a": 5}'}]
    async with sdk.chat.completions.stream(model=stack.base, messages=messages, response_format=Answer) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == Answer(a=5)


TWO = {"structured_outputs": {"regex": "a"}, "guided_regex": "a"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"choice": ["x"] * 100_000}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": {"enum": [1] * 1_000_000}}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs.yaml", "unknown_parameter"),
        ({"structured_outputs": {"x" * 5000: "a"}}, None, "unknown_parameter"),
        ({"structured_outputs": "a"}, "structured_outputs", "invalid_value"),
        ({"guided_choice": "abc"}, "guided_choice", "invalid_value"),
        ({"guided_regex": ""}, "guided_regex", "invalid_value"),
        ({"guided_json": True}, "guided_json", "invalid_value"),
        (TWO, "guided_regex", "invalid_value"),
    ],
)
async def test_a_form_that_is_none_is_refused_by_name(
    stack: Any, fields: Any, param: str | None, code: str
) -> None:
    for answer in (await stack.complete("x", **fields), await stack.chat("x", **fields)):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == code
        assert param is None or error["param"] == param
        assert len(error["message"]) < 400
    assert not stack.inference.requests


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": 1}},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "grammar"},
        {"type": "text", "nonsense": 1},
        {},
    ],
)
async def test_a_response_format_that_is_none_is_refused(stack: Any, response_format: Any) -> None:
    answer = await stack.chat("x", response_format=response_format)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("response_format")


@pytest.mark.parametrize("response_format", ["json", 5, []])
async def test_a_response_format_that_is_no_object_is_told_how_it_must_be(
    stack: Any, response_format: Any
) -> None:
    error = (await stack.chat("x", response_format=response_format)).json()["error"]
    assert error == {
        "message": 'response_format must be an object with a type, as {"type": "json_object"}',
        "type": "invalid_request_error",
        "param": "response_format",
        "code": "invalid_value",
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_what_the_service_refuses_is_named_as_the_request_spells_it(
    stack: Any, fields: Any, param: str
) -> None:
    error = (await stack.chat("refuse-grammar", **fields)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)
