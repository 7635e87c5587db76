"""Versions that were read lately, and answered again where one small question finds that they still stand.

What is told of a version is made of its record and of what points to its name. Each lies in the store with its own
sha256, that of the pointers over a revision which grows with every change to the name: where both are as they
were, everything is. So no answer is older than its question, whoever else writes to the store, or replaces it.
"""

from collections import OrderedDict
from dataclasses import dataclass

from redis.asyncio import Redis
from softprompt_api.names import AdapterRef

from softprompt_registry import keys
from softprompt_registry.catalog import AdapterVersion

_MAX_KEPT = 10_000  # some 3 kB each


@dataclass(frozen=True, slots=True)
class Seals:
    """The sha256 that lie in the store beside what points to a name, and in a version's record."""

    pointers: bytes
    record: bytes


class Recent:
    """Keeps versions by the spellings that named them."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._kept: OrderedDict[AdapterRef, tuple[AdapterVersion, Seals]] = OrderedDict()

    def keep(self, ref: AdapterRef, version: AdapterVersion, seals: Seals) -> None:
        """Keep what a spelling named, as it was read under these seals."""
        self._kept[ref] = (version, seals)
        self._kept.move_to_end(ref)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    async def find(self, ref: AdapterRef) -> AdapterVersion | None:
        """What a spelling named, if that has not changed; None: it must be read."""
        if ref not in self._kept:
            return None
        self._kept.move_to_end(ref)
        version, seals = self._kept[ref]
        pipe = self._client.pipeline(transaction=False)
        pipe.hget(keys.name(version.name), "sha256")
        pipe.hget(keys.version(version.id), "sha256")
        if await pipe.execute() != [seals.pointers, seals.record]:
            self._kept.pop(ref, None)
            return None
        return version
