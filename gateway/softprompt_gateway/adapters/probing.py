"""Have what was registered measured, a little later: nobody waits for it, and nothing depends on it."""

import asyncio
import contextvars

import structlog
from softprompt_api.errors import SoftpromptError
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion

from softprompt_gateway.catalog import Catalog, spelling_of
from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.disconnect import stop

_log = structlog.get_logger()
# Beyond these, what is registered is not measured unless somebody asks for it.
_MAX_PENDING = 1000
# So long each waits at most for a moment when nobody is served.
_PATIENCE_S = 30.0


class Probing:
    """Probes that run in the background, one at a time.

    Args:
        inference: measures.
        catalog: hears of the results.
    """

    def __init__(self, inference: InferenceClient, catalog: Catalog) -> None:
        self._inference = inference
        self._catalog = catalog
        self._pending: asyncio.Queue[AdapterVersion] = asyncio.Queue(_MAX_PENDING)
        self._working: asyncio.Task[None] | None = None

    def want(self, version: AdapterVersion) -> None:
        """Measure a version when it is its turn."""
        if self._pending.full():
            return
        self._pending.put_nowait(version)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work(), context=contextvars.Context())

    async def close(self) -> None:
        """Measure no more."""
        if self._working is not None:
            await stop(self._working)

    async def _work(self) -> None:
        while not self._pending.empty():
            version, moment = self._pending.get_nowait(), self._catalog.moment
            try:
                probed = await self._inference.probe_adapter(version, patience_s=_PATIENCE_S)
                self._catalog.learn(probed, asked_at=moment)
            except SoftpromptError as error:
                _log.info("an adapter was not probed", adapter=spelling_of(version), cause=error.reason)
