"""Counters for limits: in this process, or in a Redis or Valkey that several gateways share."""

import asyncio
import contextlib
import time
from collections import defaultdict
from typing import Any, Protocol

from limits import RateLimitItem
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from softprompt_gateway.disconnect import stop

_PREFIX = "sp:limits"
_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 32
# What nobody gave back, because its gateway died or the store was away, is free again after so long.
LEASE_S = 60.0


class Counters(Protocol):
    """What is counted for each key."""

    async def add(self, item: RateLimitItem, unit: str, key_id: str, cost: int) -> bool:
        """Count something in the window that runs, or begin one; whether it still fits."""

    async def left(self, item: RateLimitItem, unit: str, key_id: str) -> tuple[int, float]:
        """What is left in the window that runs, and the seconds that it still lasts; 0 where none runs."""

    async def enter(self, key_id: str, lease: str, most: int) -> bool:
        """Take a place; False where all are taken."""

    async def leave(self, key_id: str, lease: str) -> None:
        """Give a place back."""


class _Windows:
    """Windows of a minute that begin with the first thing counted."""

    def __init__(self, storage: Storage) -> None:
        self._limiter = FixedWindowRateLimiter(storage)

    async def add(self, item: RateLimitItem, unit: str, key_id: str, cost: int) -> bool:
        """See Counters."""
        return await self._limiter.hit(item, unit, key_id, cost=cost)

    async def left(self, item: RateLimitItem, unit: str, key_id: str) -> tuple[int, float]:
        """See Counters."""
        stats = await self._limiter.get_window_stats(item, unit, key_id)
        return stats.remaining, max(0.0, stats.reset_time - time.time())


class OwnCounters(_Windows):
    """Counters of this process."""

    def __init__(self) -> None:
        super().__init__(MemoryStorage())
        self._places: defaultdict[str, set[str]] = defaultdict(set)

    async def enter(self, key_id: str, lease: str, most: int) -> bool:
        """See Counters."""
        if len(self._places[key_id]) >= most:
            return False
        self._places[key_id].add(lease)
        return True

    async def leave(self, key_id: str, lease: str) -> None:
        """See Counters."""
        self._places[key_id].discard(lease)
        if not self._places[key_id]:
            del self._places[key_id]


class SharedCounters(_Windows):
    """Counters in a store; its failures are redis-py's."""

    def __init__(self, url: str, *, lease_s: float) -> None:
        self._lease_s = lease_s
        self._renewing: dict[str, asyncio.Task[None]] = {}
        self._pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            client_name="softprompt-gateway",
        )
        self._client = Redis(connection_pool=self._pool)
        # An option like any other, but for its type.
        pool: dict[str, Any] = {"connection_pool": self._pool}
        storage = RedisStorage("async+redis://", implementation="redispy", key_prefix=_PREFIX, **pool)
        super().__init__(storage)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._pool.disconnect()

    async def enter(self, key_id: str, lease: str, most: int) -> bool:
        """See Counters. The place is held by a lease that is renewed until `leave`."""
        name = self._places(key_id)
        if await self._hold(name, lease) > most:
            await self._client.zrem(name, lease)
            return False
        self._renewing[lease] = asyncio.create_task(self._renew(name, lease))
        return True

    async def leave(self, key_id: str, lease: str) -> None:
        """See Counters."""
        await stop(self._renewing.pop(lease))
        await self._client.zrem(self._places(key_id), lease)

    async def _hold(self, name: str, lease: str) -> int:
        """Begin or renew a lease; how many there are."""
        now = time.time()
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.zremrangebyscore(name, "-inf", now)
            pipe.zadd(name, {lease: now + self._lease_s})
            pipe.zcard(name)
            pipe.expire(name, int(self._lease_s) + 1)
            _, _, taken, _ = await pipe.execute()
        return int(taken)

    async def _renew(self, name: str, lease: str) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with contextlib.suppress(RedisError, OSError):  # the next time, if the store is back
                await self._hold(name, lease)

    @staticmethod
    def _places(key_id: str) -> str:
        return f"{_PREFIX}:parallel:{key_id}"
