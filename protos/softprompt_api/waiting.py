"""Waiting for work that goes on whoever leaves."""

import asyncio
from typing import TypeVar

Result = TypeVar("Result")


async def wait_for_shared(work: asyncio.Future[Result]) -> Result:
    """The result, or error, of work that others may wait for too: who is cancelled here does not cancel it.

    asyncio.shield is the same, but from Python 3.14 on it has an error logged where somebody has left before.
    """
    try:
        await asyncio.wait([work])
    except asyncio.CancelledError:
        work.add_done_callback(_hear)
        raise
    return work.result()


def _hear(work: asyncio.Future[Result]) -> None:
    """Where all have left, an error is nobody's, and asyncio would complain."""
    if not work.cancelled():
        work.exception()
