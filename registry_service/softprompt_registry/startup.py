"""Before the first request: is the store there, does it keep what it acknowledges, and does it run scripts?"""

import asyncio
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import redis.exceptions
import structlog
from redis.asyncio import Redis
from softprompt_api.errors import Unavailable

from softprompt_registry import keys
from softprompt_registry.connection import reply, store_errors
from softprompt_registry.full import SCRIPT_HEAD

_log = structlog.get_logger()
_RETRY_S = 0.2
_REPORT_S = 5.0

# What makes an acknowledged write survive the death of every process, the store's own too.
_REQUIRED: Mapping[str, str] = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
}
_SETTINGS = " ".join(f"--{name} {value}" for name, value in _REQUIRED.items())
# Scripts that say what they may do, and streams that count what was added to them. Valkey calls itself 7.2.
_MIN_VERSION = 7
_WRITE_AND_READ = f'{SCRIPT_HEAD}redis.call("SET", KEYS[1], ARGV[1], "EX", 60) return redis.call("GET", KEYS[1])'


class StoreUnfit(Exception):
    """The store cannot be used; the message says what to do."""


def shown_url(url: str) -> str:
    """A store's address for messages, without its password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


async def wait_for_store(client: Redis, url: str, *, timeout_s: float) -> None:
    """Return when the store answers; StoreUnfit when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    next_report = time.monotonic() + _REPORT_S / 5
    while True:
        try:
            async with store_errors():
                await reply(client.ping())
        except Unavailable as error:
            cause = str(error.__cause__)
            if _is_refused_login(error):
                raise StoreUnfit(
                    f"the store at {shown_url(url)} refuses the login: set user and password in redis_url"
                ) from None
            if time.monotonic() > deadline:
                raise StoreUnfit(
                    f"no store answers at {shown_url(url)} ({cause}); start Redis or Valkey there, or set "
                    "redis_url"
                ) from None
            if time.monotonic() > next_report:
                next_report = time.monotonic() + _REPORT_S
                _log.warning("waiting for the store", store=shown_url(url), cause=cause)
            await asyncio.sleep(_RETRY_S)
        else:
            return


def _is_refused_login(error: BaseException | None) -> bool:
    # The client wraps it into other errors on its way out of the pool.
    while error is not None:
        if isinstance(error, redis.exceptions.AuthenticationError):
            return True
        error = error.__cause__ or error.__context__
    return False


async def check_store(client: Redis, *, durability: str) -> None:
    """Raise StoreUnfit unless the store can be written, runs scripts and, for "strong", keeps what it took."""
    problems = await _problems(client)
    if problems and durability == "strong":
        raise StoreUnfit(
            f"the store would lose acknowledged adapters: {'; '.join(problems)}. Start it with "
            f"'{_SETTINGS}', or accept losses with --durability weak"
        )
    if problems:
        _log.warning("durability is weak: acknowledged adapters may be lost", problems="; ".join(problems))
    await _check_version(client)
    written = secrets.token_hex(8)
    try:
        # A key of its own: other registries may start at this moment.
        read = await reply(client.eval(_WRITE_AND_READ, 1, keys.probe(written), written))
    except redis.exceptions.NoPermissionError as error:
        raise StoreUnfit(f"the store runs no scripts: {error}. Allow EVAL to the registry") from None
    except redis.exceptions.RedisError as error:
        raise StoreUnfit(f"the store cannot be written: {error}") from None
    if read != written.encode():
        raise StoreUnfit("the store does not give back what was written")


async def _check_version(client: Redis) -> None:
    try:
        version = str((await reply(client.info("server")))["redis_version"])
    except (redis.exceptions.RedisError, KeyError):
        return  # it may not be told; what is needed of it is tried
    if int(version.partition(".")[0]) < _MIN_VERSION:
        raise StoreUnfit(f"the store is Redis {version}; supported: Redis from {_MIN_VERSION}.0, and Valkey")


async def _problems(client: Redis) -> list[str]:
    problems = []
    for name, wanted in _REQUIRED.items():
        try:
            found = (await reply(client.config_get(name))).get(name)
        except redis.exceptions.RedisError as error:
            return [f"its settings cannot be read ({error})"]
        if found != wanted:
            problems.append(f"{name} is {found!r} and must be {wanted!r}")
    return problems
