"""Versions that were read lately: told again where the store says that nothing of them has changed."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain
from sys import getsizeof

from softprompt_api.names import AdapterRef

from softprompt_registry.catalog import AdapterVersion
from softprompt_registry.lookups import Seals

_MAX_KEPT = 10_000  # some 3 kB each
# A config may have up to a megabyte, and none that a trainer wrote has.
_MAX_TEXT_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A version, and the seals under which it was read."""

    version: AdapterVersion
    seals: Seals


class Recent:
    """Keeps versions by the spellings that named them, the least recently asked for forgotten first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[AdapterRef, Kept] = OrderedDict()

    def keep(self, ref: AdapterRef, kept: Kept) -> None:
        """Keep what a spelling named; of a version with a config or labels beyond all measure, nothing is kept."""
        texts = (kept.version.config_json, *chain(*kept.version.labels.items()))
        if sum(map(getsizeof, texts)) > _MAX_TEXT_BYTES:
            return
        self._kept[ref] = kept
        self._kept.move_to_end(ref)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def find(self, ref: AdapterRef) -> Kept | None:
        """What a spelling named when it was last read."""
        if ref in self._kept:
            self._kept.move_to_end(ref)
        return self._kept.get(ref)
