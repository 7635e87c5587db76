"""The registry's lease: while it is held, what the catalogue knows is what there is, and nobody need be asked.

The registry acknowledges no change before this gateway has taken it, or its lease is over.
"""

import asyncio
import contextlib
import math
import time

import structlog
from softprompt_api.errors import SoftpromptError

from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import RegistryClient

# A gateway that nobody uses asks for no lease: no change waits for it.
_IDLE_S = 300.0
_RENEWALS = 4  # in the time of a lease
_MARGIN = 0.9  # of a lease: this clock may go slower than the registry's
_PAUSE_S = 1.0
# Goes on while the machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_log = structlog.get_logger()


class Lease:
    """Holds the registry's lease while it is used.

    Args:
        catalog: knows the changes that have been taken.
    """

    def __init__(self, catalog: Catalog, registry: RegistryClient) -> None:
        self._catalog = catalog
        self._registry = registry
        self._until_s = -math.inf
        self._used_s = -math.inf
        self._is_used = asyncio.Event()

    def is_held(self) -> bool:
        """Whether the catalogue knows now what names stand for; to ask is to use it."""
        now_s = _now_s()
        self._used_s = now_s
        self._is_used.set()
        return now_s < self._until_s

    async def run(self) -> None:
        """Hold it whenever it is used, until cancelled."""
        while True:
            await self._is_used.wait()
            try:
                await self._hold()
            except SoftpromptError as error:
                _log.debug("no lease: the registry is asked for each name", reason=error.reason)
                await asyncio.sleep(_PAUSE_S)

    async def _hold(self) -> None:
        async with self._registry.open_lease() as ask:
            try:
                while _now_s() - self._used_s < _IDLE_S:
                    lease_s, asked_s, cursor = 0.0, _now_s(), self._catalog.cursor
                    if cursor:  # it has been listed
                        lease_s = await ask(cursor)
                    if lease_s:
                        self._until_s = asked_s + lease_s * _MARGIN
                    await self._catalog.wait_beyond(cursor, patience_s=lease_s / _RENEWALS or _PAUSE_S)
                self._is_used.clear()
            finally:
                self._until_s = -math.inf  # before the registry is told
                with contextlib.suppress(SoftpromptError, TimeoutError):
                    async with asyncio.timeout(_PAUSE_S):
                        await ask("")


def _now_s() -> float:
    return time.clock_gettime(_CLOCK)
