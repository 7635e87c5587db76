"""The engine's steps, for who works on the processors that they are computed on: a piece of work beside each."""

import asyncio
from collections import deque
from collections.abc import Callable

# Steps of prompts are long, and an engine may have nothing to compute after all.
_MAX_WAIT_S = 0.25


class Steps:
    """They end one after the other; of all who wait for one, the end of each lets the first go on.

    A step's threads wait for each other. Where another process takes the processor of one for 50 ms, the step is
    50 ms longer; cut into pieces, the same work costs each of many steps a little.

    Args:
        are_held_up: tells whether work that goes on now would hold up somebody's step.
    """

    def __init__(self, are_held_up: Callable[[], bool]) -> None:
        self.are_held_up = are_held_up
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait until a step has ended and this is the first who waits for one; not where nothing is held up."""
        if not self.are_held_up():
            return
        ended = asyncio.get_running_loop().create_future()
        self._waiting.append(ended)
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                await ended
        except TimeoutError:
            pass
        finally:
            if ended in self._waiting:
                self._waiting.remove(ended)

    def end(self) -> None:
        """One has ended."""
        while self._waiting:
            ended = self._waiting.popleft()
            if not ended.done():
                ended.set_result(None)
                return


# Of an engine that nothing holds up.
FREE_STEPS = Steps(lambda: False)
