"""What an output must be, where it is not free: JSON, a match of a regular expression, one of some texts …"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt_api.errors import InvalidArgument

FIELD = "structured_outputs"
MAX_GRAMMAR_CHARACTERS = 2**17
MAX_CHOICES = 1024
MAX_SCHEMA_VALUES = 20_000
MAX_SCHEMA_DEPTH = 64
# White space that JSON may have where it may have any, a regular expression: a model may break lines and indent,
# but left to itself, a small one would write spaces for ever.
JSON_WHITESPACE = r" |\n[ \t]{0,32}"
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must be; exactly one is set. InvalidArgument where it is not, or has another type or size.

    What is in it is checked by who compiles it.

    Attributes:
        json: a JSON Schema, as an object or its text; kept as text.
        regex: a regular expression that the whole output matches.
        choice: the texts of which it is one.
        grammar: a Lark grammar in llguidance's dialect.
        json_object: any JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if self._holds(kind)]
        if len(given) != 1:
            raise _wrong(
                f"exactly one of {', '.join(KINDS)} must be given; there is {' and '.join(given) or 'none'}"
            )
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choices(self.choice))
        if not isinstance(self.json_object, bool | None):
            raise _wrong("json_object must be true or false")
        kind, text = self.spelled
        if not isinstance(text, str) or not text.strip():
            raise _wrong(f"{kind} must be a text that is not empty")
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise _wrong(f"{kind} has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS}")
        _check_unicode(text, what=kind, field=FIELD)

    def _holds(self, kind: str) -> bool:
        value = getattr(self, kind)
        return value is not None and not (kind == "json_object" and value is False)

    @property
    def spelled(self) -> tuple[str, str]:
        """Which kind it is, and all of it as one text: what it is equal by."""
        if self.json_object:
            return "json_object", '{"type": "object"}'
        if self.choice is not None:
            return "choice", json.dumps(self.choice, ensure_ascii=False)
        kind = next(kind for kind in ("json", "regex", "grammar") if getattr(self, kind) is not None)
        return kind, getattr(self, kind)


def parse_schema(text: str) -> dict[str, Any]:
    """A JSON Schema that is small enough to be looked at; InvalidArgument where it is not."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong("json is no JSON, or nested too deep") from None
    return check_object(schema, what="a JSON Schema", field=FIELD)


def parse_object(text: str, *, what: str, field: str) -> dict[str, Any]:
    """The JSON object that a text is; InvalidArgument as in `check_object`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument(f"{what} must be a JSON object", field=field) from None
    return check_object(value, what=what, field=field)


def check_object(value: Any, *, what: str, field: str) -> dict[str, Any]:
    """The parsed JSON object; InvalidArgument where it is none, too large or deep, or has texts that are none."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} must be a JSON object", field=field)
    num_values = 0
    open_values: list[Iterator[Any]] = [iter((value,))]
    while open_values:
        inner = next(open_values[-1], None)
        if inner is None:
            open_values.pop()
            continue
        num_values += 1
        if num_values > MAX_SCHEMA_VALUES:
            raise InvalidArgument(f"{what} has more than {MAX_SCHEMA_VALUES} values", field=field)
        if isinstance(inner, (dict, list)):
            if len(open_values) > MAX_SCHEMA_DEPTH:
                raise InvalidArgument(f"{what} is nested deeper than {MAX_SCHEMA_DEPTH}", field=field)
            open_values.append(_values(inner))
    _check_unicode(json.dumps(value, ensure_ascii=False), what=what, field=field)
    return value


def _check_unicode(text: str, *, what: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} holds a lone surrogate, which is no character", field=field) from None


def _values(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    members = value.values() if isinstance(value, dict) else value
    return (member for member in members if member is not None)


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise _wrong("json must be a JSON Schema: an object, or its text")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise _wrong("json must be a JSON Schema: it holds what JSON cannot, or is nested too deep") from None


def _checked_choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise _wrong("choice must be a list of texts")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise _wrong(f"choice has {len(choices)} texts; 1 to {MAX_CHOICES} are allowed")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise _wrong("each choice must be a text that is not empty")
    return tuple(choices)


def _wrong(message: str) -> InvalidArgument:
    return InvalidArgument(message, field=FIELD)
