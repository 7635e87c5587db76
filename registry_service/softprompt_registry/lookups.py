"""What a spelling leads to, found by the store itself: scripts that it runs, each at one moment and in one turn.

A caller who knows an answer from before says under which sha256 it was read: where nothing has changed since, the
store says just that. So no answer is older than its question, whoever else writes to the store, or replaces it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from softprompt_api.names import LATEST

from softprompt_registry import keys, pointers
from softprompt_registry.blobs import BlobStart
from softprompt_registry.connection import reply
from softprompt_registry.scripts import pairs

Record = Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Seals:
    """The sha256 that lie in the store beside what points to a name, and in a version's record."""

    pointers: bytes
    record: bytes


_NO_SEALS = Seals(pointers=b"", record=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A version as it lies in the store.

    Attributes:
        record: its hash; empty where it is missing.
        pointers: what points to its name, as `pointers.decode` reads it; empty where only content was asked for.
        start: what `blobs` reads first of its tensor file, where that was asked for.
        is_unchanged: everything is as it was read under the caller's seals, and not told again.
    """

    version_id: int = 0
    record: Record = field(default_factory=dict)
    pointers: Sequence[Any] = ()
    start: BlobStart | None = None
    is_unchanged: bool = False


_UNCHANGED = 1
# What scripts have in common: how keys are spelled, and what is told of a version. That is 1 where it is as the
# caller knows it, nothing where it has no record, and else its id, its record, and what `pointers.decode` reads.
_COMMON = f"""{pointers.SCRIPT}
local function version(id) return string.format("{keys.version("%s")}", id) end
local function aliases(name) return string.format("{keys.aliases("%s")}", name) end
local function versions(name) return string.format("{keys.versions("%s")}", name) end

local function answer(id, name)
  if not id or not name or redis.call("EXISTS", version(id)) == 0 then return {{}} end
  local told = pointers(string.format("{keys.name("%s")}", name), aliases(name), versions(name))
  if ARGV[1] ~= "" and told[1][3] == ARGV[1] and redis.call("HGET", version(id), "sha256") == ARGV[2] then
    return {_UNCHANGED}
  end
  return {{id, redis.call("HGETALL", version(id)), told}}
end
"""
_BY_NAME = f"""{_COMMON}
local name, alias, number, most = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local id
if number ~= "" then
  id = redis.call("ZRANGEBYSCORE", versions(name), number, number)[1]
else
  id = redis.call("HGET", aliases(name), alias)
  if not id and alias == "{LATEST}" then id = redis.call("ZRANGE", versions(name), -1, -1)[1] end
end
local told = answer(id, name)
if most == 0 or told == {_UNCHANGED} or #told == 0 then return told end
local sha256 = redis.call("HGET", version(id), "tensors_sha256") or ""
local blob = string.format("{keys.blob("%s")}", sha256)
local size = tonumber(redis.call("HGET", blob, "size_bytes") or "")
if size and size <= most then
  told[4] = redis.call("HGETALL", blob)
  told[5] = redis.call("GET", string.format("{keys.chunk("%s", 0)}", sha256))
end
return told
"""
_BY_DIGEST = f"""{_COMMON}
local ids = redis.call("ZRANGE", ARGV[3], 0, 1)
return #ids == 1 and answer(ids[1], redis.call("HGET", version(ids[1]), "name")) or {{}}
"""
_BY_ID = f"""{_COMMON}
return answer(ARGV[3], redis.call("HGET", version(ARGV[3]), "name"))
"""
_CONTENT = f"""
local ids = redis.call("ZRANGE", ARGV[1], 0, 1)
if #ids ~= 1 then return {{}} end
local version = string.format("{keys.version("%s")}", ids[1])
local sha256 = redis.call("HGET", version, "tensors_sha256") or ""
return {{
  ids[1],
  redis.call("HGETALL", version),
  redis.call("HGETALL", string.format("{keys.blob("%s")}", sha256)),
  redis.call("GET", string.format("{keys.chunk("%s", "%s")}", sha256, ARGV[2])),
}}
"""


class Lookups:
    """Asks the store what a spelling leads to."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def by_name(
        self,
        name: str,
        *,
        alias: str = "",
        number: int | None = None,
        seals: Seals | None = None,
        file_up_to_bytes: int = 0,
    ) -> Found | None:
        """One of a name's versions: the numbered one, the alias's, or the latest; None where there is none.

        Args:
            file_up_to_bytes: tell of its tensor file too, where it has at most so many, which one chunk holds.
        """
        spelled = (name, alias or LATEST, "" if number is None else number)
        return await self._version(_BY_NAME, seals, *spelled, file_up_to_bytes)

    async def by_digest(self, digest: str) -> Found | None:
        """The version with a digest; None where there is none, or more than one."""
        return await self._version(_BY_DIGEST, None, keys.digest(digest))

    async def by_id(self, version_id: int, *, seals: Seals | None = None) -> Found | None:
        """The version with a global id; None where there is none."""
        return await self._version(_BY_ID, seals, version_id)

    async def content(self, digest: str, *, chunk: int) -> Found | None:
        """The version with a digest, and what lies in the store of its tensor file; None where there is none, or
        more than one."""
        answer = await self._run(_CONTENT, keys.digest(digest), chunk)
        if not answer:
            return None
        version_id, record, blob, data = answer
        start = BlobStart(facts=pairs(blob), chunk=data)
        return Found(version_id=int(version_id), record=pairs(record), start=start)

    async def _version(self, script: str, seals: Seals | None, *arguments: Any) -> Found | None:
        known = seals or _NO_SEALS
        answer = await self._run(script, known.pointers, known.record, *arguments)
        if answer == _UNCHANGED:
            return Found(is_unchanged=True)
        if not answer:
            return None
        version_id, record, told, *file = answer
        start = BlobStart(facts=pairs(file[0]), chunk=file[1]) if file else None
        return Found(version_id=int(version_id), record=pairs(record), pointers=told, start=start)

    async def _run(self, script: str, *arguments: Any) -> Any:
        return await reply(self._client.eval(script, 0, *arguments))
