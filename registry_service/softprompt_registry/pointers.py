"""What a name stands for: `latest` and the other aliases, as pointers to its versions.

`latest` is stored only while it was moved off the highest version: a registration, or the deletion of the version
it points to, forgets it, and the highest version is the latest again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio.client import Pipeline
from softprompt_api.errors import DataCorrupted
from softprompt_api.names import LATEST

from softprompt_registry import keys
from softprompt_registry.catalog import AdapterVersion
from softprompt_registry.connection import reply

NUM_REPLIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointers:
    """The pointers of one name, by global ids of versions; 0 is none.

    Attributes:
        highest: the version with the highest number.
        moved: aliases and what they point to; `latest` only where it is not the highest.
        revision: grows with every change to the name.
    """

    highest: int
    moved: Mapping[str, int]
    revision: int

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


def ask(pipe: Pipeline, name: str) -> None:
    """Queue the commands that read a name's pointers."""
    pipe.hget(keys.name(name), "revision")
    pipe.hgetall(keys.aliases(name))
    pipe.zrange(keys.versions(name), 0, 0, desc=True)


def decode(replies: Sequence[Any]) -> Pointers:
    """The pointers in the replies to what `ask` queued."""
    revision, moved, highest = replies
    try:
        return Pointers(
            highest=int(highest[0]) if highest else 0,
            moved={alias.decode(): int(version_id) for alias, version_id in moved.items()},
            revision=int(revision or 0),
        )
    except ValueError as error:
        raise DataCorrupted("the stored aliases of a name cannot be read") from error


async def read_watched(pipe: Pipeline, name: str) -> Pointers:
    """A name's pointers inside a transaction that watches the name."""
    return decode(
        [
            await reply(pipe.hget(keys.name(name), "revision")),
            await reply(pipe.hgetall(keys.aliases(name))),
            await reply(pipe.zrange(keys.versions(name), 0, 0, desc=True)),
        ]
    )
