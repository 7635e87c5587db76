"""Which registry gives leases, where several may share a store: one of them, or none.

Each registry knows the leases that it gave, and no others. So one claims that it gives them. A registry that finds
another's claim when it has something to acknowledge ends all giving, and waits until what was given is over.
"""

import asyncio
import contextlib
import time
from uuid import uuid4

import redis.exceptions
import structlog
from redis.asyncio import Redis

from softprompt_registry import keys
from softprompt_registry.connection import reads, reply, writes
from softprompt_registry.full import also_when_full

_log = structlog.get_logger()
_NOBODY = "nobody"
# Far beyond any lease. A registry that is then alone gives leases again.
_NOBODY_S = 600


class Claim:
    """This registry's claim, in the store: `who:random:milliseconds`, the longest lease that may still be held.

    Times are durations by this process's clock: no two clocks are compared.

    Args:
        lease_s: of the leases that it gives.
    """

    def __init__(self, client: Redis, *, lease_s: float) -> None:
        self._client = client
        self._lease_ms = int(lease_s * 1000)
        self._own = f"registry:{uuid4().hex}"
        self._was_made = False
        self._is_lost = False
        # What was last found in the store, and when leases from before it will be over.
        self._found = ""
        self._over_at_s = 0.0

    async def holds(self) -> bool:
        """Whether a lease that was asked for before may be given.

        The claim is made once, and can be lost to another registry; it is made anew where there is none.
        """
        found = await self._read()
        if found.startswith(self._own):
            return True
        if self._was_made and found:
            if not self._is_lost:
                _log.warning("another registry serves this store: gateways will ask for each name")
            self._is_lost = True
            return False
        claimed = f"{self._own}:{max(self._lease_ms, _milliseconds(found))}"
        if not await self._write(claimed, *(() if found else ("NX",))):
            return await self.holds()  # another came first
        # A store that was away may be asked again: what it has forgotten may have been given.
        self._note(claimed, is_first=not found and not self._was_made)
        self._was_made = True
        return True

    async def settle(self) -> None:
        """Return once no lease is held that another registry gave before this call."""
        found = await self._read()
        if not found:
            return  # nobody gives any
        if not found.startswith((self._own, _NOBODY)):
            _log.info("leases of another registry are waited for", milliseconds=_milliseconds(found))
            found = f"{_NOBODY}:{uuid4().hex}:{_milliseconds(found)}"
            await self._write(found, "EX", _NOBODY_S)
        if found != self._found:
            self._note(found)
        await asyncio.sleep(max(0.0, self._over_at_s - time.monotonic()))

    async def release(self) -> None:
        """Take the claim back, where it is still held, by a registry that knows of no lease."""
        if self._was_made and time.monotonic() >= self._over_at_s:
            await self._delete_own()

    def _note(self, found: str, *, is_first: bool = False) -> None:
        self._found = found
        self._over_at_s = 0.0 if is_first else time.monotonic() + _milliseconds(found) / 1000

    @reads
    async def _read(self) -> str:
        found: bytes | None = await reply(self._client.get(keys.LEASES))
        return (found or b"").decode(errors="replace")

    @writes
    async def _write(self, value: str, *options: str | int) -> bool:
        return bool(await reply(also_when_full(self._client, "SET", keys.LEASES, value, *options)))

    @writes
    async def _delete_own(self) -> None:
        async with self._client.pipeline() as pipe:
            await pipe.watch(keys.LEASES)
            found: bytes | None = await reply(pipe.get(keys.LEASES))
            pipe.multi()  # type: ignore[no-untyped-call]
            if found is not None and found.startswith(self._own.encode()):
                pipe.delete(keys.LEASES)
            with contextlib.suppress(redis.exceptions.WatchError):  # it is another's by now
                await pipe.execute()


def _milliseconds(found: str) -> int:
    """How long a lease may be held after what was found was written."""
    number = found.rpartition(":")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else 0
