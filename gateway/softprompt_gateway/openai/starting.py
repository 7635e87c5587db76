"""The start of a request's generations, with the versions that its names stand for."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from softprompt_api.errors import SoftpromptError
from softprompt_api.waiting import hear_error

from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.errors import Refused, fields_spelled
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.job import Work
from softprompt_gateway.resolve import Named, Resolver, Target

Some = TypeVar("Some", bound=Work)


class Starting:
    """Resolves names, and starts generations on the inference service."""

    def __init__(self, resolver: Resolver, inference: InferenceClient, metrics: Metrics) -> None:
        self._resolver = resolver
        self._inference = inference
        self._metrics = metrics

    async def begin(self, named: Named, work_with: Callable[[Target], Awaitable[Some]]) -> tuple[Some, Generation]:
        """The work with the versions that names stand for now, and its generation.

        Where they are not known for sure, to ask what they stand for takes as long as a short prompt's step. So
        the work is begun with the versions that were last heard of, and nothing is said of it before the registry
        has answered; where that tells of others, it is begun anew. Errors are those of the work, and of the names,
        as they are now.
        """
        began_s = time.perf_counter()
        known = self._resolver.known(named)
        if known is None:
            return await self._start(await work_with(await self._resolve(named)))
        if not known.adapters:
            return await self._start(await work_with(known))
        if self._resolver.knows_all():
            self._metrics.resolved("lease", time.perf_counter() - began_s)
            return await self._start(await work_with(known))
        asking = asyncio.create_task(self._resolve(named))
        hear_error(asking)  # the client may leave
        begun: tuple[Some, Generation] | None = None
        failed: SoftpromptError | Refused | None = None
        is_kept = False
        try:
            try:
                begun = await self._start(await work_with(known))
            except (SoftpromptError, Refused) as error:
                failed = error
            target = await asking
            is_kept = target.is_same(known)
        finally:
            asking.cancel()
            if begun is not None and not is_kept:
                begun[1].cancel()
        if not is_kept:
            return await self._start(await work_with(target))
        if begun is None:
            assert failed is not None
            raise failed
        return begun

    async def _resolve(self, named: Named) -> Target:
        began_s = time.perf_counter()
        target = await self._resolver.resolve(named)
        if target.adapters:
            self._metrics.resolved("registry", time.perf_counter() - began_s)
        return target

    async def _start(self, work: Some) -> tuple[Some, Generation]:
        work.meter.facts |= work.target.facts
        with fields_spelled(adapter="model"):
            return work, await Generation.start(self._inference, work.target.place, work.calls)
