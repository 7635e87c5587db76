"""The open loop: requests are sent when they are due, whether or not earlier ones were answered."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from softprompt.bench.server import Outcome, Server
from softprompt.bench.workload import Request


async def run(
    server: Server,
    requests: Sequence[Request],
    *,
    max_concurrency: int | None,
    tell: Callable[[Outcome], None],
) -> tuple[list[Outcome], float]:
    """Send all; the outcomes in order, and the seconds from the beginning to the last answer.

    Args:
        max_concurrency: most requests on their way at one time; the wait for a place counts as the server's time.
        tell: is told each outcome as it comes.
    """
    places: contextlib.AbstractAsyncContextManager[Any] = (
        contextlib.nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    began_s = time.perf_counter()

    async def one(request: Request) -> Outcome:
        await asyncio.sleep(max(0.0, began_s + request.send_at_s - time.perf_counter()))
        async with places:
            outcome = await server.complete(request, began_s)
        tell(outcome)
        return outcome

    outcomes = await asyncio.gather(*[one(request) for request in requests])
    return outcomes, time.perf_counter() - began_s
