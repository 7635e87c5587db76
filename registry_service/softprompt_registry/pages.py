"""Pages of versions: as many as were asked for, or as many as fit a message."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from softprompt_registry import catalog
from softprompt_registry.catalog import AdapterVersion

# A config may have 1 MiB, and a message must stay well below its limit.
MAX_PAGE_BYTES = 2 * 2**20
# Few at first, for what is read at once may be large; more where it turns out to be small.
_FIRST_BATCH = 16
_LARGEST_BATCH = 64

# Items after a position, at most so many: each item's own position, and its version unless it was deleted.
Fetch = Callable[[str, int], Awaitable[Sequence[tuple[str, AdapterVersion | None]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a list; `next_token` is "" on the last."""

    versions: Sequence[AdapterVersion]
    next_token: str


async def read_page(fetch: Fetch, *, query: str, size: int, token: str) -> Page:
    """The page that a token begins; `query` tells one list's tokens from another's."""
    size = catalog.page_size(size)
    after = catalog.page_start(token, query)
    versions: list[AdapterVersion] = []
    num_bytes, batch = 0, _FIRST_BATCH
    while len(versions) < size and num_bytes < MAX_PAGE_BYTES:
        items = await fetch(after, min(batch, size - len(versions)))
        if not items:
            return Page(versions=versions, next_token="")
        for position, version in items:
            after = position
            if version is not None:
                versions.append(version)
                num_bytes += len(version.config_json)
            if num_bytes >= MAX_PAGE_BYTES:
                break
        if num_bytes < MAX_PAGE_BYTES // 8:
            batch = min(2 * batch, _LARGEST_BATCH)
    is_last = not await fetch(after, 1)
    return Page(versions=versions, next_token="" if is_last else catalog.page_token(query, after))
