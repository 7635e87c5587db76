"""Notice a client that leaves, and stop working for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from softprompt_gateway.connection import Connection
from softprompt_gateway.errors import ClientGone

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled at once, with a ClientGone, if the client leaves."""
    connection = Connection.of(request.scope)
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    is_left = False

    def leave() -> None:
        nonlocal is_left
        if connection.is_gone and not is_left:
            is_left = True
            task.cancel()

    connection.follow(leave)
    try:
        if connection.is_gone:
            work.close()
            raise ClientGone
        return await work
    except asyncio.CancelledError:
        # As asyncio's own timeouts do: a cancellation that is not ours goes on.
        if is_left and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        connection.follow(None)


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
