"""What an API key may take: requests and tokens in a minute, and requests at the same time.

Counters are shared by all gateways of one Redis or Valkey; while it is away, and where there is none, each gateway
counts for itself.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.exceptions
import structlog
from limits import RateLimitItemPerMinute
from softprompt_api.errors import RateLimited
from softprompt_api.shares import Shares
from starlette.types import Scope

from softprompt_gateway.caller import Caller
from softprompt_gateway.counters import LEASE_S, MAX_CONNECTIONS, Counters, OwnCounters, SharedCounters

T = TypeVar("T")

_PARALLEL_RETRY_MS = 1000
# A store that failed is left alone for so long: every request would wait for it.
_AWAY_S = 5.0
# At the same time; the store has a few connections more, for what is renewed and given back.
_MAX_QUESTIONS = MAX_CONNECTIONS - 8
_STATE = "meter"
_log = structlog.get_logger()


class Meter:
    """Counts the tokens of one request, and keeps what there is to tell of it.

    Attributes:
        began_s: when its headers were there, on time.perf_counter.
        facts: for its log line.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.began_s = time.perf_counter()
        self.facts: dict[str, Any] = {}

    @classmethod
    def new(cls, scope: Scope) -> "Meter":
        """A new one, that the request's route finds."""
        meter = scope["state"][_STATE] = cls()
        meter.began_s = scope["state"]["began_s"]
        return meter

    @classmethod
    def of(cls, scope: Scope) -> "Meter":
        """A request's."""
        meter: Meter = scope["state"][_STATE]
        return meter

    @classmethod
    def facts_of(cls, scope: Scope) -> dict[str, Any]:
        """What there is to tell of a request; nothing where its route was not reached."""
        meter: Meter | None = scope["state"].get(_STATE)
        return meter.facts if meter is not None else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """One of the limits of a key: what is left of it, and for how long it lasts."""

    unit: str
    item: RateLimitItemPerMinute
    remaining: int
    reset_s: float

    def headers(self) -> dict[str, str]:
        return {
            f"x-ratelimit-limit-{self.unit}": str(self.item.amount),
            f"x-ratelimit-remaining-{self.unit}": str(self.remaining),
            f"x-ratelimit-reset-{self.unit}": f"{round(self.reset_s)}s",
        }

    def refusal(self) -> RateLimited:
        return RateLimited(
            f"this API key may take {self.item.amount} {self.unit} in a minute, and has taken them; try again in "
            f"{max(1, round(self.reset_s))} s",
            details={"retry_after_ms": str(max(1, round(self.reset_s * 1000))), **self.headers()},
        )


class Limiter:
    """Admits requests, and counts what they took.

    Args:
        max_requests: most that are answered at the same time here; tenants share them.
        redis_url: where gateways count together; None: this one counts alone.
        lease_s: how long a place of a request is taken after its gateway died.
    """

    def __init__(self, redis_url: str | None, *, max_requests: int, lease_s: float = LEASE_S) -> None:
        self._shares = Shares(max_requests, what="requests are being answered")
        self._own = OwnCounters()
        self._shared = SharedCounters(redis_url, lease_s=lease_s) if redis_url is not None else None
        self._away_until_s = 0.0
        # A flood waits here: a store that has no connection left for it is not away.
        self._turns = asyncio.Semaphore(_MAX_QUESTIONS)

    async def close(self) -> None:
        """Close the connections."""
        if self._shared is not None:
            await self._shared.close()

    @contextlib.asynccontextmanager
    async def admitted(self, caller: Caller, meter: Meter) -> AsyncIterator[dict[str, str]]:
        """A caller's request, for the time of the context; headers that say what is left. RateLimited otherwise,
        or Overloaded where the caller's tenant has its share of this gateway.

        Tokens are known when they have been made: a request is let in while the minute has some left.
        """
        limits, key_id = caller.limits, caller.key_id
        with self._shares.holding(caller.tenant):
            async with self._one_of(key_id, limits.parallel_requests):
                headers: dict[str, str] = {}
                if limits.tokens_per_minute:
                    headers |= await self._check("tokens", key_id, limits.tokens_per_minute)
                if limits.requests_per_minute:
                    headers |= await self._check("requests", key_id, limits.requests_per_minute, cost=1)
                try:
                    yield headers
                finally:
                    if limits.tokens_per_minute and meter.tokens:
                        item = RateLimitItemPerMinute(limits.tokens_per_minute)
                        await self._ask(lambda counters: counters.add(item, "tokens", key_id, meter.tokens))

    async def _check(self, unit: str, key_id: str, amount: int, *, cost: int = 0) -> dict[str, str]:
        """Take from one of the limits, or only look (0); the headers that say what is left of it."""
        item = RateLimitItemPerMinute(amount)

        async def take(counters: Counters) -> tuple[bool, _Window]:
            was_left = not cost or await counters.add(item, unit, key_id, cost)
            remaining, reset_s = await counters.left(item, unit, key_id)
            window = _Window(unit=unit, item=item, remaining=remaining, reset_s=reset_s)
            return was_left if cost else remaining > 0, window

        fits, window = await self._ask(take)
        if not fits:
            raise window.refusal()
        return window.headers()

    @contextlib.asynccontextmanager
    async def _one_of(self, key_id: str, most: int) -> AsyncIterator[None]:
        """One of a bounded number of places; 0: there is no bound."""
        if not most:
            yield
            return
        lease = secrets.token_hex(8)

        async def enter(counters: Counters) -> tuple[bool, Counters]:
            return await counters.enter(key_id, lease, most), counters

        fits, counters = await self._ask(enter)
        if not fits:
            raise RateLimited(
                f"this API key may have {most} requests answered at the same time, and has them; try again",
                details={"retry_after_ms": str(_PARALLEL_RETRY_MS)},
            )
        try:
            yield
        finally:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):  # the lease ends by itself
                await counters.leave(key_id, lease)

    async def _ask(self, question: Callable[[Counters], Awaitable[T]]) -> T:
        """Ask the shared counters, or this gateway's own while those are away."""
        if self._shared is not None:
            async with self._turns:
                if not self._is_away:
                    try:
                        return await question(self._shared)
                    except (redis.exceptions.RedisError, OSError) as error:
                        if not self._is_away:
                            _log.warning(
                                "the store of limits is away, this gateway counts alone", cause=str(error)
                            )
                        self._away_until_s = time.monotonic() + _AWAY_S
        return await question(self._own)

    @property
    def _is_away(self) -> bool:
        return time.monotonic() < self._away_until_s
