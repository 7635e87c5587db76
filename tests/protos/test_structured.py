"""What an output must be is one thing, of a bounded size."""

from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.params import SamplingParams
from softprompt_api.structured import (
    MAX_GRAMMAR_CHARACTERS,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_VALUES,
    StructuredOutputsParams,
    parse_schema,
)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ({"json": {"type": "object"}}, ("json", '{"type": "object"}')),
        ({"json": '{"type":"object"}'}, ("json", '{"type":"object"}')),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"choice": ["a", "ü"]}, ("choice", '["a", "ü"]')),
        ({"grammar": "start: /a/"}, ("grammar", "start: /a/")),
        ({"json_object": True}, ("json_object", '{"type": "object"}')),
        ({"json_object": False, "regex": "a"}, ("regex", "a")),
    ],
)
def test_each_kind_is_spelled_as_one_text(given: Any, spelled: tuple[str, str]) -> None:
    assert StructuredOutputsParams(**given).spelled == spelled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object must be given; there is none"),
        ({"json_object": False}, "there is none"),
        ({"json": {}, "regex": "a"}, "there is json and regex"),
        ({"regex": ""}, "regex must be a text"),
        ({"regex": 5}, "regex must be a text"),
        ({"grammar": " \n"}, "grammar must be a text"),
        ({"json": 5}, "json must be a JSON Schema"),
        ({"json": [1]}, "json must be a JSON Schema"),
        ({"json": {"const": float("nan")}}, "holds what JSON cannot"),
        ({"json": {"const": object()}}, "holds what JSON cannot"),
        ({"json": nested(100_000)}, "nested too deep"),
        ({"json_object": 1}, "json_object must be true or false"),
        ({"choice": "abc"}, "choice must be a list of texts"),
        ({"choice": []}, "choice has 0 texts"),
        ({"choice": ["a"] * 1025}, "choice has 1025 texts; 1 to 1024"),
        ({"choice": ["a", ""]}, "each choice must be a text"),
        ({"choice": ["a", 1]}, "each choice must be a text"),
        ({"choice": ["a" * MAX_GRAMMAR_CHARACTERS]}, "choice has 131076 characters; at most 131072"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}, "regex has 131073 characters"),
        ({"json": {"enum": list(range(100_000))}}, "json has .* characters; at most"),
    ],
)
def test_anything_else_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        StructuredOutputsParams(**given)
    assert caught.value.field == "structured_outputs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "json is no JSON"),
        ("[" * 100_000, "json is no JSON"),
        ("[]", "must be a JSON object"),
        ("true", "must be a JSON object"),
        ('{"enum": [' + "0," * MAX_SCHEMA_VALUES + "0]}", f"more than {MAX_SCHEMA_VALUES} values"),
        ('{"not":' * 500 + "{}" + "}" * 500, f"deeper than {MAX_SCHEMA_DEPTH}"),
    ],
)
def test_a_schema_that_is_none_or_too_large_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        parse_schema(text)
    assert caught.value.field == "structured_outputs"


def test_a_schema_up_to_the_limits_is_read() -> None:
    assert parse_schema('{"a": null, "b": [1, {"c": false}]}') == {"a": None, "b": [1, {"c": False}]}
    parse_schema('{"not":' * (MAX_SCHEMA_DEPTH - 1) + "{}" + "}" * (MAX_SCHEMA_DEPTH - 1))


def test_sampling_parameters_hold_it_whole() -> None:
    params = StructuredOutputsParams(regex="a+")
    assert SamplingParams(structured_outputs=params).structured_outputs is params
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(structured_outputs={"regex": "a+"})  # type: ignore[arg-type]
    assert caught.value.field == "structured_outputs"
