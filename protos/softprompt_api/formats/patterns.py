"""Patterns from strangers for names of modules, matched as PEFT matches them (`get_pattern_key`).

PEFT takes any regular expression, and some take for ever to match. Taken here are those without groups and
repetitions: each of their alternatives matches a fixed number of characters, at one place in a name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompt_api.formats import checks
from softprompt_api.names import shown

_MAX_PATTERNS = 1024
_ATOM = r"(?:[\w.-]|\\[.dw]|\[[A-Za-z0-9_-]+\])"
_ATOMS = re.compile(_ATOM, re.ASCII)
_ALTERNATIVE = re.compile(rf"(?P<start>\^?)(?P<middle>{_ATOM}+)\$?", re.ASCII)

Patterns = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alternative:
    expression: re.Pattern[str]
    length: int
    is_whole: bool

    def matches(self, name: str) -> bool:
        """Whether it is the whole name, or its end behind a dot."""
        start = len(name) - self.length
        if start < 0 or (start > 0 and (self.is_whole or name[start - 1] != ".")):
            return False
        return self.expression.fullmatch(name, start) is not None


def values_of(patterns: Patterns, names: Iterable[str], default: float) -> dict[str, float]:
    """For each name the value of the first pattern that matches it. The patterns have passed a check."""
    rules = [([_alternative(part) for part in pattern.split("|")], value) for pattern, value in patterns]
    return {
        name: next((value for rule, value in rules if any(part.matches(name) for part in rule)), default)
        for name in names
    }


def pattern_map(check: checks.Check) -> checks.Check:
    """A map of patterns to values that pass `check`, or null."""

    def check_all(key: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping) or len(value) > _MAX_PATTERNS:
            checks.refuse(key, f"must be a map of at most {_MAX_PATTERNS} names of modules, or null")
        for pattern, one in value.items():
            _check_pattern(key, pattern)
            check(key, one)

    return check_all


def _check_pattern(key: str, pattern: str) -> None:
    try:
        for part in pattern.split("|"):
            _alternative(part)
    except (ValueError, re.error):
        checks.refuse(
            key,
            f"has the pattern {shown(pattern)}; supported: names of modules or their ends, with '.', '\\d', "
            "'\\w', '[...]', '|', '^' and '$', and without groups or repetitions",
        )


def _alternative(text: str) -> _Alternative:
    match = _ALTERNATIVE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    middle = match["middle"]
    return _Alternative(
        expression=re.compile(middle), length=len(_ATOMS.findall(middle)), is_whole=bool(match["start"])
    )
