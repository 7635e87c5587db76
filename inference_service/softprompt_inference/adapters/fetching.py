"""How many adapters are fetched at one time: a few with small files, and a few with large ones."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.turns import Places

# Each fetch holds an adapter, and for a moment its file.
MAX_FETCHES = 4

MakeWay = Callable[[], Awaitable[None]]
Fetch = Callable[[str, MakeWay], Awaitable[Adapter]]


async def no_way_needed() -> None:
    """Nobody waits for a place."""


class NoWay(Exception):
    """As many large files as may be are being fetched: this one must be fetched later."""


class Fetches:
    """Fetches in turn: tenants', one after the other; small files wait for no large one.

    Args:
        fetch: gets a verified adapter by digest; may raise. When it finds that the file is large it awaits its
            second argument, and lets through what that raises.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._small = Places(MAX_FETCHES)
        self._large = Places(MAX_FETCHES)

    async def fetch(self, digest: str, tenant: str) -> Adapter:
        """An adapter, when its turn comes."""
        async with AsyncExitStack() as place:
            await place.enter_async_context(self._small.taken(tenant))

            async def make_way() -> None:
                if not self._large.has_free:
                    raise NoWay
                await place.aclose()
                await place.enter_async_context(self._large.taken(tenant))

            try:
                return await self._fetch(digest, make_way)
            except NoWay:
                pass
        async with self._large.taken(tenant):
            return await self.fetch_at_once(digest)

    async def fetch_at_once(self, digest: str) -> Adapter:
        """An adapter, whatever else is being fetched."""
        return await self._fetch(digest, no_way_needed)
