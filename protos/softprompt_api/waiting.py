"""Waiting for work that goes on whoever leaves, and errors of it that nobody is left to hear of."""

import asyncio
from typing import Any, TypeVar

Result = TypeVar("Result")


async def wait_for_shared(work: asyncio.Future[Result]) -> Result:
    """The result, or error, of work that others may wait for too: who is cancelled here does not cancel it.

    asyncio.shield is the same, but from Python 3.14 on it has an error logged where somebody has left before.
    """
    try:
        await asyncio.wait([work])
    except asyncio.CancelledError:
        hear_error(work)
        raise
    return work.result()


def hear_error(work: asyncio.Future[Any]) -> None:
    """Let an error of this work be nobody's where nobody waits for it: asyncio would complain."""
    work.add_done_callback(lambda done: done.cancelled() or done.exception())
