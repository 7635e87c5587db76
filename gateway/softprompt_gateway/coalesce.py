"""One question for all who ask the same at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from softprompt_api.waiting import wait_for_shared

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")


class Coalesced(Generic[Key, Answer]):
    """Asks for everybody who waits for the same answer, as if each had asked alone.

    An answer is for those who wanted it before it was asked for: it holds whatever had been acknowledged to
    anybody when they came. Whoever comes while a question is under way shares the next one.

    Args:
        ask: the question.
    """

    def __init__(self, ask: Callable[[Key], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._asked: dict[Key, asyncio.Task[Answer]] = {}
        self._next: dict[Key, asyncio.Task[Answer]] = {}

    async def get(self, key: Key) -> Answer:
        """The answer, or the error that it is for all who share it; one of them leaving does not end it."""
        if (task := self._next.get(key)) is None:
            task = self._next[key] = asyncio.create_task(self._ask_after(self._asked.get(key), key))
        return await wait_for_shared(task)

    async def _ask_after(self, asked: asyncio.Task[Answer] | None, key: Key) -> Answer:
        if asked is not None:
            await asyncio.wait([asked])
        self._asked[key] = self._next.pop(key)
        try:
            return await self._ask(key)
        finally:
            del self._asked[key]
