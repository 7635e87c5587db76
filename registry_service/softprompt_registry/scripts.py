"""Many keys read in one turn: scripts that the store runs, and what scripts answer in Python's shapes.

Each command of a pipeline costs its client more than the store needs for a hundred.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from softprompt_registry.connection import reply

# At one time: the store answers nobody meanwhile, and holds all of the answer.
_MAX_FIELDS = 1000
_MAX_HASHES = 25
_READ_FIELDS = """
local found = {}
for index, key in ipairs(KEYS) do found[index] = redis.call("HMGET", key, unpack(ARGV)) end
return found
"""
_READ_HASHES = """
local found = {}
for index, key in ipairs(KEYS) do found[index] = redis.call("HGETALL", key) end
return found
"""


def pairs(flat: Sequence[bytes]) -> Mapping[bytes, bytes]:
    """A hash, as a script gives it."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def read_fields(client: Redis, hashes: Sequence[str], *names: str) -> list[list[bytes | None]]:
    """Fields of hashes, in their order; None: not there. `client` may be a pipeline that watches."""
    return await run_for_each(client, _READ_FIELDS, hashes, *names, at_once=_MAX_FIELDS)


async def read_hashes(client: Redis, hashes: Sequence[str]) -> list[Mapping[bytes, bytes]]:
    """Whole hashes, in their order; empty: not there."""
    return [pairs(flat) for flat in await run_for_each(client, _READ_HASHES, hashes, at_once=_MAX_HASHES)]


async def run_for_each(
    client: Redis, script: str, stored: Sequence[str], *arguments: str, at_once: int
) -> list[Any]:
    """What a script answers for each of its keys, so many at one time."""
    found: list[Any] = []
    for first in range(0, len(stored), at_once):
        some = stored[first : first + at_once]
        found += await reply(client.eval(script, len(some), *some, *arguments))
    return found
