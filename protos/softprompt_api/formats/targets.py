"""Which modules a LoRA's config means, by PEFT's rule (`check_target_module_exists`); others PEFT ignores."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

from softprompt_api.errors import AdapterInvalid
from softprompt_api.names import shown

_WORD = re.compile(r"\w+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The modules that a config means, as far as it lists names; expressions are not looked at.

    Attributes:
        named: modules, or how they end; None: the config has an expression, or says nothing.
        excluded: the same, of those that are left out.
        layers: the only ones whose modules are meant, of those that are named by their ends; None: all.
        patterns: words before the number of a layer, with their places in the config; empty: any word is one.
    """

    named: frozenset[str] | None
    excluded: frozenset[str]
    layers: frozenset[int] | None
    patterns: Mapping[str, int]

    def check(self, modules: Iterable[str]) -> None:
        """Raise AdapterInvalid for a module of the file that the config does not mean."""
        for module in modules:
            key = self._key_against(module)
            if key:
                raise AdapterInvalid(
                    f"{key} in adapter_config.json leaves out {shown(module, 128)}, for which the file has "
                    "matrices; PEFT would not use them; supported: files of the modules that the config means",
                    field=f"config.{key}",
                )

    def _key_against(self, module: str) -> str:
        """The config's key by which a module is left out; "": it is meant."""
        if self.excluded and not self.excluded.isdisjoint(_ends(module)):
            return "exclude_modules"
        if self.named is None or module in self.named:
            return ""
        if self.named.isdisjoint(_ends(module)):
            return "target_modules"
        return "" if self.layers is None or self._layer_of(module) in self.layers else "layers_to_transform"

    def _layer_of(self, module: str) -> int | None:
        """The number of its layer: the first in its name, or the first behind the first of the patterns in it."""
        words = module.split(".")
        if not self.patterns:
            # PEFT wants more than one word in front of it, and in any case one behind it.
            return next((int(number) for number in words[2:-1] if number.isdecimal()), None)
        found = [
            (self.patterns[word], int(number))
            for word, number in pairwise(words[:-1])
            if word in self.patterns and number.isdecimal()
        ]
        return min(found, key=itemgetter(0))[1] if found else None


def targets_of(config: Mapping[str, Any]) -> Targets:
    """The modules that a config of checked keys means."""
    named, excluded = config.get("target_modules"), config.get("exclude_modules")
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    words = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    numbers = (layers,) if isinstance(layers, int) else layers
    can_tell = all(map(_WORD.fullmatch, words))
    return Targets(
        named=frozenset(named) if isinstance(named, list) else None,
        excluded=frozenset(excluded) if isinstance(excluded, list) else frozenset(),
        layers=frozenset(numbers) if numbers and can_tell else None,
        patterns={word: place for place, word in reversed(list(enumerate(words)))},
    )


def _ends(module: str) -> Iterator[str]:
    """A module's name, and what is behind each of its dots."""
    while module:
        yield module
        module = module.partition(".")[2]
