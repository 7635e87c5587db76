"""The words of the generated SQL questions: tables with their columns, and values to fill them with."""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_POOLS: dict[str, list[str]] = {name: text.split() for name, text in _WORDS["pools"].items()}
_PLACES = ("stadium", "university", "international airport", "hall")
_COMPANIES = ("group", "brothers", "media", "industries")
# Every third word of a pool is for the held-out part alone.
_HELD_OUT_EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: what it is called, and what its values are.

    kind  a numeric range, a sort of text such as `person`, or the values themselves as `red|white|black`
    """

    name: str
    kind: str

    @property
    def numeric(self) -> bool:
        return self.kind in _WORDS["spans"]

    @property
    def sql_type(self) -> str:
        return "INTEGER" if self.numeric else "VARCHAR"

    @property
    def phrase(self) -> str:
        """The name as a question says it."""
        return self.name.replace("_", " ")

    @property
    def span(self) -> tuple[int, int]:
        """The half-open range of a numeric column."""
        low, high = _WORDS["spans"][self.kind]
        return int(low), int(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """One table: its name, which is the plural of what a row of it is called, and its columns."""

    table: str
    noun: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuePools:
    """Words to make values of: the held-out part and the training part have none in common."""

    held_out: bool

    def value(self, column: Column, rng: random.Random) -> str:
        """Return a value for a column of text, now and then in title case."""
        text = rng.choice(column.kind.split("|")) if "|" in column.kind else self._text(column.kind, rng)
        return text.title() if rng.random() < 0.3 else text

    def _text(self, kind: str, rng: random.Random) -> str:
        match kind:
            case "person":
                return f"{self._word('first_names', rng)} {self._word('last_names', rng)}"
            case "city":
                return self._word("cities", rng)
            case "country":
                return self._word("countries", rng)
            case "title":
                return f"{rng.choice(['the ', ''])}{self._word('adjectives', rng)} {self._word('nouns', rng)}"
            case "team":
                return f"{self._word('cities', rng)} {self._word('animals', rng)}"
            case "company":
                return f"{self._word('last_names', rng)} {rng.choice(_COMPANIES)}"
            case "place":
                return f"{self._word('cities', rng)} {rng.choice(_PLACES)}"
            case "code":
                return "".join(rng.choices("abcdefghklmnprstuvw", k=3)) + str(rng.randint(10, 99))
        raise ValueError(f"unknown kind of column {kind!r}")

    def _word(self, pool: str, rng: random.Random) -> str:
        words = _POOLS[pool]
        return rng.choice([w for i, w in enumerate(words) if (i % _HELD_OUT_EVERY == 0) == self.held_out])


def load_themes(part: str) -> tuple[Theme, ...]:
    """Return the tables of one part, `train` or `held_out`."""
    return tuple(
        Theme(
            table=theme["table"],
            noun=theme["noun"],
            columns=tuple(Column(name=name, kind=kind) for name, kind in theme["columns"].items()),
        )
        for theme in _WORDS[part]
    )
