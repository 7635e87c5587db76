"""What the OpenAPI document tells of fields whose types say less than is checked."""

from collections.abc import Mapping
from typing import Any

from pydantic import WithJsonSchema
from softprompt_api.params import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_TOKENS_LIMIT
from softprompt_api.structured import KINDS, MAX_CHOICES, MAX_GRAMMAR_CHARACTERS

Schema = dict[str, Any]


def unserved(*served: object) -> WithJsonSchema:
    """A field that is refused unless it holds something empty, or one of these values."""
    return WithJsonSchema({"enum": [None, False, "", [], {}, *served]})


def only(value: object) -> WithJsonSchema:
    """A field that may hold this value and no other."""
    return WithJsonSchema({"enum": [None, value]})


# An effort of none, and nothing else that is set.
REASONING = WithJsonSchema(
    {
        "anyOf": [
            {"enum": [None, False, "", []]},
            {
                "type": "object",
                "properties": {"effort": {"enum": [None, "none"]}},
                "additionalProperties": {"type": "null"},
            },
        ]
    }
)


def _array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


# Of names of functions and schemas; see `validation.check_name`.
NAME: Schema = {"pattern": "^[A-Za-z0-9_-]{1,64}$"}
LOGIT_BIAS: Schema = {
    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

_stop: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
STOP = WithJsonSchema({"anyOf": [_stop, _array(_stop, maxItems=MAX_STOP_STRINGS)]})

_text: Schema = {"type": "string", "pattern": r"\S", "maxLength": MAX_GRAMMAR_CHARACTERS}
_choice = _array({"type": "string", "minLength": 1}, minItems=1, maxItems=MAX_CHOICES)
_MEMBERS: Mapping[str, Schema] = {
    "json": {"anyOf": [{"type": "object"}, _text]},
    "regex": _text,
    "choice": _choice,
    "grammar": _text,
    "json_object": {"const": True},
}


def _form(kind: str) -> Schema:
    """`structured_outputs` with this member, and with no other that is set."""
    unset: Schema = {other: {"type": "null"} for other in KINDS} | {"json_object": {"enum": [None, False]}}
    return {
        "type": "object",
        "properties": unset | {kind: _MEMBERS[kind]},
        "required": [kind],
        "additionalProperties": False,
    }


STRUCTURED_OUTPUTS = WithJsonSchema({"anyOf": [_form(kind) for kind in KINDS]})


def member(kind: str) -> WithJsonSchema:
    """A field that is a member of `structured_outputs` under an older name."""
    return WithJsonSchema({"anyOf": [_MEMBERS[kind], {"type": "null"}]})


def prompts(parts: Schema) -> WithJsonSchema:
    """`prompt` of completions, where one in parts looks like this."""
    text: Schema = {"type": "string", "minLength": 1}
    ids = _array({"type": "integer", "minimum": 0, "maximum": MAX_TOKENS_LIMIT}, minItems=1)
    many = [_array(text, minItems=1), _array({"anyOf": [ids, parts]}, minItems=1)]
    return WithJsonSchema({"anyOf": [text, ids, parts, *many]})


# A prompt in parts has text beside its soft prompts.
SOME_TEXT: Schema = {
    "minItems": 1,
    "contains": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string", "minLength": 1}},
        "required": ["type", "text"],
    },
}

# A response format has a schema exactly where its type says so.
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        {"properties": {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}},
        {
            "properties": {"type": {"const": "json_schema"}, "json_schema": {"type": "object"}},
            "required": ["json_schema"],
        },
    ]
}

# JSON Schema of a function's arguments, which are an object.
PARAMETERS: Schema = {"properties": {"type": {"const": "object"}}}

# A message says something, or is an assistant's with calls, which no other has.
MESSAGE: Schema = {
    "anyOf": [
        {
            "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
            "required": ["tool_calls"],
        },
        {
            "properties": {
                "content": {"type": ["string", "array"]},
                "tool_calls": {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]},
            },
            "required": ["content"],
        },
    ]
}
