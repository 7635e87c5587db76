"""The start of a request's generations, with the versions that its names stand for."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from softprompt_api.errors import SoftpromptError
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.errors import fields_spelled
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Named, Resolver, Target


class Startable(Protocol):
    """What a request asks for, with its names resolved.

    Its log line tells of it, also where it cannot start.
    """

    @property
    def target(self) -> Target:
        """What it is computed with."""

    @property
    def meter(self) -> Meter:
        """Where its log line finds what there is to tell."""

    @property
    def calls(self) -> Sequence[pb.GenerateRequest]:
        """One Generate request per prompt."""


Work = TypeVar("Work", bound=Startable)


class Starting:
    """Resolves names, and starts generations on the inference service."""

    def __init__(self, resolver: Resolver, inference: InferenceClient) -> None:
        self._resolver = resolver
        self._inference = inference

    async def begin(self, named: Named, work_with: Callable[[Target], Awaitable[Work]]) -> tuple[Work, Generation]:
        """The work with the versions that names stand for now, and its generation.

        To ask what they stand for takes as long as a short prompt's step. So the work is begun with the versions
        that were last heard of, and nothing is said of it before the registry has answered; where that tells of
        others, it is begun anew. Errors are those of the work, and of the names, as they are now.
        """
        known = self._resolver.known(named)
        if known is None or not known.adapters:
            return await self._start(await work_with(await self._resolver.resolve(named)))
        asking = asyncio.create_task(self._resolver.resolve(named))
        asking.add_done_callback(_look_at_error)
        begun: tuple[Work, Generation] | None = None
        failed: SoftpromptError | None = None
        is_kept = False
        try:
            try:
                begun = await self._start(await work_with(known))
            except SoftpromptError as error:
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

    async def _start(self, work: Work) -> tuple[Work, Generation]:
        work.meter.facts |= work.target.facts()
        with fields_spelled(adapter="model"):
            return work, await Generation.start(self._inference, work.calls)


def _look_at_error(task: "asyncio.Task[Target]") -> None:
    # Where the client has left, nobody else does, and asyncio would complain.
    if not task.cancelled():
        task.exception()
