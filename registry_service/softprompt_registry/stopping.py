"""The end of calls that would last for ever, so that their clients turn elsewhere."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from softprompt_api.errors import Unavailable

Answer = TypeVar("Answer")


class Stopping:
    """Whether the registry stops, for calls that wait for something else."""

    def __init__(self) -> None:
        self._has_begun = asyncio.Event()

    def begin(self) -> None:
        """End what waits, now and from now on."""
        self._has_begun.set()

    async def or_else(self, awaited: Awaitable[Answer]) -> Answer:
        """What is waited for; Unavailable where the registry stops first."""
        waiting = asyncio.ensure_future(awaited)
        stopping = asyncio.create_task(self._has_begun.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Unavailable("the registry is stopping")
            return waiting.result()
        finally:
            waiting.cancel()
            stopping.cancel()

    async def through(self, coming: AsyncIterator[Answer]) -> AsyncIterator[Answer]:
        """What comes, one after the other; Unavailable where the registry stops before the next."""
        while True:
            try:
                came = await self.or_else(anext(coming))
            except StopAsyncIteration:
                return
            yield came
