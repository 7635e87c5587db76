r"""How long an expression is when its repetitions are written out, which bounds what following it may cost.

llguidance bounds the work of a step, but nested repetitions such as (a{1000}){1000} may take it seconds and
gigabytes before it notices. So `x{2,5}` counts as five of x, and what refers to another terminal as all of that.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from softprompt_api.errors import InvalidArgument
from softprompt_api.structured import FIELD, check_object

MAX_LENGTH = 5_000
# Nested repetitions make numbers that take long to write: nothing is measured beyond this.
_ENDLESS = 10**9
_REGEX = re.compile(
    r"(?P<count>\{\d{1,9}(?:,\d{0,9})?\})|(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\]?)|(?P<escape>\\.)"
    r"|(?P<open>\()|(?P<close>\))|(?P<either>\|)|(?P<plain>[^\\()\[{|]+|.)",
    re.DOTALL,
)
_LARK = re.compile(
    # What is not closed takes all that follows, or looking for the end would take quadratic time.
    r"(?P<count>\{\d{1,9}(?:,\d{0,9})?\}|~\s*\d{1,9}(?:\s*\.\.\s*\d{1,9})?)"
    r'|(?P<text>"(?:\\.|[^"\\])*"?i?)|(?P<regex>/(?:\\.|[^/\\])+/?[a-z]*)|(?P<name>[A-Za-z_][\w-]*)'
    r"|(?P<comment>(?://|#)[^\n]*)|(?P<open>[(\[])|(?P<close>[)\]])|(?P<other>.)",
    re.DOTALL,
)
_NUMBER = re.compile(r"\d+")
_JSON = re.compile(r"%json\s*(?=\{)")
_TERMINAL = re.compile(r"^[ \t]*([A-Z_][A-Z0-9_-]*)[^\n:]*:(.*(?:\n[ \t]*\|.*)*)", re.MULTILINE)


def check_regex(text: str) -> None:
    """Raise InvalidArgument for a regular expression that is too long."""
    _check(regex_length(text))


def check_patterns(schema: Any) -> None:
    """Raise InvalidArgument for a schema that has such an expression."""
    for pattern in _patterns(schema):
        check_regex(pattern)


def check_lark(text: str) -> None:
    """Raise InvalidArgument for a grammar with a terminal, or an expression in a rule, that is too long."""
    bodies = dict(_TERMINAL.findall(text))
    lengths: dict[str, int] = {}

    def length_of(name: str) -> int:
        if name not in lengths:
            lengths[name] = 1  # one that refers to itself is none; llguidance says so
            lengths[name] = _lark_length(bodies[name], length_of, bodies) if name in bodies else 1
        return lengths[name]

    try:
        _check(max(map(length_of, bodies), default=0))
    except RecursionError:
        raise InvalidArgument("terminals refer to each other in too long a row", field=FIELD) from None
    _check(_lark_length(text, lambda _: 1, {}, are_texts_long=False))
    for schema in _inner_schemas(text):
        check_patterns(schema)


def map_expressions(text: str, change: Callable[[str], str]) -> str:
    """A grammar with its regular expressions changed."""
    return _LARK.sub(lambda piece: change(piece[0]) if piece.lastgroup == "regex" else piece[0], text)


def regex_length(text: str) -> int:
    """Characters of a regular expression with its repetitions written out."""
    lengths = _Lengths()
    for match in _REGEX.finditer(text):
        match match.lastgroup:
            case "count":
                lengths.repeat(match[0])
            case "plain":
                lengths.add(len(match[0]) - 1)
                lengths.add(1)  # what a count behind it repeats
            case "class" | "escape":
                lengths.add(1)
            case kind:
                lengths.group(kind)
    return lengths.total()


def _lark_length(
    text: str, length_of: Callable[[str], int], known: Mapping[str, str], *, are_texts_long: bool = True
) -> int:
    lengths = _Lengths()
    for match in _LARK.finditer(text):
        found = match[0]
        match match.lastgroup:
            case "count":
                lengths.repeat(found)
            case "regex":
                lengths.add(regex_length(found[1:].rpartition("/")[0] or found[1:]))
            case "name" if found in known:
                lengths.add(length_of(found))
            case "text" if are_texts_long:
                lengths.add(len(found))
            case kind:
                lengths.group(kind)
    return lengths.total()


class _Lengths:
    """Of the groups that are open, the innermost last; each with that of its last part."""

    def __init__(self) -> None:
        self._open = [0]
        self._last = 0

    def add(self, length: int) -> None:
        self._open[-1] = min(self._open[-1] + length, _ENDLESS)
        self._last = min(length, _ENDLESS)

    def group(self, kind: str | None) -> None:
        if kind == "open":
            self._open.append(0)
        elif kind == "close" and len(self._open) > 1:
            self.add(self._open.pop())

    def repeat(self, count: str) -> None:
        length, more = self._last, self._last * (max(map(int, _NUMBER.findall(count))) - 1)
        self.add(max(more, 0))
        self._last = min(length + max(more, 0), _ENDLESS)

    def total(self) -> int:
        return sum(self._open)


def _inner_schemas(text: str) -> Iterator[dict[str, Any]]:
    """The JSON Schemas behind `%json`; what is no JSON is left for llguidance to refuse."""
    decoder = json.JSONDecoder()
    for mark in _JSON.finditer(text):
        try:
            schema, _ = decoder.raw_decode(text, mark.end())
        except (ValueError, RecursionError):
            continue
        yield check_object(schema, what="a JSON Schema", field=FIELD)


def _check(length: int) -> None:
    if length > MAX_LENGTH:
        raise InvalidArgument(
            f"an expression has {length} characters or more when its repetitions are written out; "
            f"at most {MAX_LENGTH}",
            field=FIELD,
        )


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        if isinstance(properties := schema.get("patternProperties"), dict):
            yield from properties
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _patterns(inner)
