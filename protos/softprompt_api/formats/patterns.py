"""Patterns from strangers for names of modules, matched as PEFT matches them (`get_pattern_key`).

PEFT takes any regular expression, and some take for ever to match. Taken here are those without groups and
repetitions: each of their alternatives matches a fixed number of characters, at one place in a name. So all are
matched at once, with one bit for each (Shift-And): a name takes one step for each of its characters, however many
alternatives there are.
"""

import re
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from softprompt_api.formats import checks
from softprompt_api.names import shown

# What is sent must be read in less time than others notice, on the loop that serves them.
_MAX_LENGTH = 256
_MAX_CHARACTERS = 65_536
_MAX_PARTS = 1024
_ATOM = r"(?:[\w.-]|\\[.dw]|\[[A-Za-z0-9_-]+\])"
_ATOMS = re.compile(_ATOM, re.ASCII)
_ALTERNATIVE = re.compile(rf"(?P<start>\^?)(?P<middle>{_ATOM}+)\$?", re.ASCII)
_RANGES = re.compile("(.)(?:-(.))?")
_WORD = string.ascii_letters + string.digits + "_"
_STANDS_FOR: Mapping[str, str] = {".": _WORD + ".", r"\.": ".", r"\d": string.digits, r"\w": _WORD}

Patterns = tuple[tuple[str, float], ...]


class _Matcher:
    """The alternatives of all patterns, in order; the lowest bit stands for the first of them.

    Raises:
        ValueError: with an alternative, or a part of one, that is not supported.
    """

    def __init__(self, patterns: Patterns) -> None:
        self._values: list[float] = []
        self._whole = 0
        # By how many characters a name has behind a place: which alternatives begin there, and which go on there
        # with a character.
        self._begin = [0] * (_MAX_LENGTH + 1)
        self._go_on: list[dict[str, int]] = [defaultdict(int) for _ in self._begin]
        atoms: dict[tuple[int, str], int] = defaultdict(int)
        for pattern, value in patterns:
            for start, middle in map(_split, pattern.split("|")):
                bit = 1 << len(self._values)
                self._values.append(value)
                self._whole |= bit if start else 0
                self._begin[len(middle)] |= bit
                for place, atom in enumerate(reversed(middle)):
                    atoms[place, atom] |= bit
        for (place, atom), bits in atoms.items():
            for character in _characters(atom):
                self._go_on[place][character] |= bits

    def value(self, name: str, default: float) -> float:
        """The value of the first alternative that is the whole name, or its end behind a dot."""
        going, matched = (1 << len(self._values)) - 1, 0
        for character, begin, go_on in zip(reversed(name), self._begin, self._go_on, strict=False):
            if character == ".":
                matched |= going & begin & ~self._whole
            going &= go_on.get(character, 0)
            if not going:
                break
        else:
            matched |= going & self._begin[len(name)]
        first = matched & -matched
        return self._values[first.bit_length() - 1] if matched else default


@lru_cache(maxsize=4)  # what was checked is asked next, and not once only
def _matcher(patterns: Patterns) -> _Matcher:
    return _Matcher(patterns)


def values_of(patterns: Patterns, names: Iterable[str], default: float) -> dict[str, float]:
    """For each name the value of the first pattern that matches it. The patterns have passed a check."""
    if not patterns:
        return dict.fromkeys(names, default)
    matcher = _matcher(patterns)
    return {name: matcher.value(name, default) for name in names}


def pattern_map(check: checks.Check) -> checks.Check:
    """A map of patterns to values that pass `check`, or null."""

    def check_all(key: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping):
            checks.unsupported(key, value, "a map of names of modules, or null")
        _check_size(key, value)
        for pattern, one in value.items():
            check(f"{key}.{pattern}", one)
        try:
            _matcher(tuple(value.items()))
        except ValueError as error:
            checks.refuse(
                key,
                f"has {shown(str(error))} in a pattern; supported: names of modules or their ends, with '.', "
                "'\\d', '\\w', '[...]', '|', '^' and '$', and without groups or repetitions",
            )

    return check_all


def _check_size(key: str, patterns: Iterable[str]) -> None:
    lengths = [len(pattern) for pattern in patterns]
    num_parts = sum(1 + pattern.count("|") + pattern.count("[") for pattern in patterns)
    for found, most, what in (
        (max(lengths, default=0), _MAX_LENGTH, "characters in one pattern"),
        (sum(lengths), _MAX_CHARACTERS, "characters in its patterns"),
        (num_parts, _MAX_PARTS, "alternatives and '[...]' in its patterns"),
    ):
        if found > most:
            checks.refuse(key, f"has {found} {what}; at most {most}")


def _split(alternative: str) -> tuple[str, list[str]]:
    """Its "^" or "", and what it has for each character of a name."""
    match = _ALTERNATIVE.fullmatch(alternative)
    if match is None:
        raise ValueError(alternative)
    return match["start"], _ATOMS.findall(match["middle"])


def _characters(atom: str) -> Iterable[str]:
    """The characters of names that it stands for."""
    if not atom.startswith("["):
        return _STANDS_FOR.get(atom, atom)
    characters: set[str] = set()
    for first, last in _RANGES.findall(atom[1:-1]):
        if last and last < first:
            raise ValueError(atom)
        characters |= {chr(code) for code in range(ord(first), ord(last or first) + 1)}
    return characters
