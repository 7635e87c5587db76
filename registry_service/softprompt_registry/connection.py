"""The connection to Redis or Valkey: timeouts, retries of reads, and its failures in our words."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from time import monotonic
from typing import Any, ParamSpec, TypeVar

import redis.exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from softprompt_api.errors import Overloaded, Unavailable
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

P = ParamSpec("P")
T = TypeVar("T")

_FIRST_WAIT_S = 0.05
_MAX_REPEATING_S = 0.5
_BROKEN = (redis.exceptions.ConnectionError, OSError)
LOST = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)


def open_store(url: str, *, timeout_s: float, max_connections: int) -> Redis:
    """A client with a bounded pool, whose every command ends within the time and is sent once."""
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        # A write that is sent twice would happen twice; only reads are repeated, by `reads` below.
        retry=Retry(NoBackoff(), 0),
        client_name="softprompt-registry",
    )
    return Redis(connection_pool=pool)


async def reply(answer: Any) -> Any:
    """The answer to a command; redis-py types it as a union over options that nobody here uses."""
    return await answer


@asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Translate the store's failures: away or refusing → Unavailable, full → Overloaded."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise Overloaded("the store is full; delete adapters or give it more memory") from error
    except LOST as error:
        raise Unavailable("the store is away; try again") from error
    except redis.exceptions.RedisError as error:
        raise Unavailable("the store refuses the command; its log has the reason") from error


def writes(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a method that changes the store: failures translated, never repeated."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        async with store_errors():
            return await function(*args, **kwargs)

    return call


def reads(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a method that only reads: repeated a few times when the connection is lost, not when it hangs."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        async with store_errors():
            # Nearly every read succeeds at once, and need not pay for what repeats it.
            begun_s = monotonic()
            try:
                return await function(*args, **kwargs)
            except _BROKEN:
                if monotonic() - begun_s > _MAX_REPEATING_S:
                    raise
            await asyncio.sleep(_FIRST_WAIT_S)
            left_s = _MAX_REPEATING_S - (monotonic() - begun_s)
            retrying = AsyncRetrying(
                retry=retry_if_exception_type(_BROKEN),
                stop=stop_after_attempt(2) | stop_after_delay(left_s),
                wait=wait_random_exponential(multiplier=0.05, max=0.4),
                reraise=True,
            )
            return await retrying(function, *args, **kwargs)

    return call
