"""What a name stands for: `latest` and the other aliases, as pointers to its versions.

`latest` is stored only while it was moved off the highest version: a registration, or the deletion of the version
it points to, forgets it, and the highest version is the latest again.

Beside them lies the sha256 of them all: what was changed by anything but a writer of ours is found out, and costs
its own name alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio import Redis
from softprompt_api.errors import DataCorrupted
from softprompt_api.names import LATEST

from softprompt_registry import keys
from softprompt_registry.catalog import AdapterVersion
from softprompt_registry.scripts import pairs, run_for_each

# What `decode` reads, for scripts: of a name's counters, aliases and versions, by their keys.
SCRIPT = """
local function pointers(counters, aliases, versions)
  return {
    redis.call("HMGET", counters, "revision", "next", "sha256"),
    redis.call("HGETALL", aliases),
    redis.call("ZRANGE", versions, -1, -1),
  }
end
"""
_READ = f"""{SCRIPT}
local found = {{}}
for index = 1, #KEYS, 3 do found[#found + 1] = pointers(KEYS[index], KEYS[index + 1], KEYS[index + 2]) end
return found
"""
_MAX_KEYS = 3 * 100  # at one time


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointers:
    """The pointers of one name, by global ids of versions; 0 is none.

    Attributes:
        highest: the version with the highest number.
        moved: aliases and what they point to; `latest` only where it is not the highest.
        revision: grows with every change to the name.
        next: the number of its next version.
    """

    highest: int
    moved: Mapping[str, int]
    revision: int
    next: int = 1

    def target(self, alias: str) -> int:
        """The version that an alias points to."""
        return self.moved.get(alias, self.highest if alias == LATEST else 0)

    def aliases_of(self, version_id: int) -> tuple[str, ...]:
        """The aliases that point to a version, in order."""
        return tuple(alias for alias in sorted({*self.moved, LATEST}) if self.target(alias) == version_id)

    def describe(self, version: AdapterVersion) -> AdapterVersion:
        """The version with what points to it."""
        return replace(version, aliases=self.aliases_of(version.id), revision=self.revision)

    def after(self, alias: str, version_id: int) -> "Pointers":
        """The pointers once the alias was set to a version, or removed (0)."""
        moved = {other: target for other, target in self.moved.items() if other != alias}
        if version_id and (alias, version_id) != (LATEST, self.highest):
            moved[alias] = version_id
        return replace(self, moved=moved, revision=self.revision + 1)


async def ask(client: Redis, names: Sequence[str]) -> list[Sequence[Any]]:
    """What `decode` reads, of each name, each of one moment."""
    read = [key for name in names for key in (keys.name(name), keys.aliases(name), keys.versions(name))]
    return await run_for_each(client, _READ, read, at_once=_MAX_KEYS)


def decode(told: Sequence[Any]) -> Pointers:
    """The pointers in what a script told of a name."""
    (revision, number, sealed), moved, highest = told
    try:
        pointers = Pointers(
            highest=int(highest[0]) if highest else 0,
            moved={alias.decode(): int(version_id) for alias, version_id in pairs(moved).items()},
            revision=int(revision or 0),
            next=int(number or 1),
        )
    except ValueError as error:
        raise _damaged() from error
    # Names that nobody has changed since earlier versions of this software have none.
    if sealed is not None and sealed != sha256(pointers).encode():
        raise _damaged()
    return pointers


def sha256(pointers: Pointers) -> str:
    """Of all that they are, as it lies beside them."""
    parts = [pointers.highest, sorted(pointers.moved.items()), pointers.revision, pointers.next]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _damaged() -> DataCorrupted:
    return DataCorrupted("what is stored of this name's aliases is damaged; delete the name, and register it anew")


async def read(client: Redis, name: str) -> Pointers:
    """A name's pointers of one moment; `client` may be a pipeline that watches the name."""
    [told] = await ask(client, [name])
    return decode(told)
