"""One change to one name: all of it or nothing.

Writers never wait for each other. Every change raises the name's revision, and every transaction watches it: one
that lost a race begins anew.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from softprompt_registry import catalog, keys, pointers
from softprompt_registry.connection import LOST
from softprompt_registry.full import also_when_full
from softprompt_registry.pointers import Pointers

T = TypeVar("T")

_MAX_ATTEMPTS = 200
_MAX_JITTER_S = 0.02


async def transact(
    client: Redis, name: str, attempt: Callable[[Pipeline], Awaitable[T]], *, also: Sequence[str] = ()
) -> T:
    """What `attempt` returns, once nobody changed the name, or the keys `also`, between its reads and its writes.

    It is handed a pipeline that watches them, and may watch more.
    """
    async with client.pipeline(transaction=True) as pipe:
        for _ in range(_MAX_ATTEMPTS):
            try:
                await pipe.watch(keys.name(name), *also)
                return await attempt(pipe)
            except redis.exceptions.WatchError as error:
                # redis-py says so of a lost connection as well, and then the transaction may be done.
                if isinstance(lost := error.__context__, LOST):
                    raise lost from None
                # A connection that has seen a change fails every transaction.
                await pipe.reset()  # type: ignore[no-untyped-call]
                await asyncio.sleep(random.uniform(0, _MAX_JITTER_S))
    raise catalog.too_many_writers(name)


def begin(pipe: Pipeline, name: str, new: Pointers) -> None:
    """From here on commands are queued; the first writes the name's counters and seal as they are at the end."""
    pipe.multi()  # type: ignore[no-untyped-call]
    counters = ("revision", str(new.revision), "next", str(new.next), "sha256", pointers.sha256(new))
    also_when_full(pipe, "HSET", keys.name(name), *counters)
