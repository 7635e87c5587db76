"""Pages of a list: as many items as were asked for, or as many as fit a message."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from softprompt_registry import catalog

T = TypeVar("T")

# One item may have more than 1 MiB, and a message must stay well below its limit.
MAX_PAGE_BYTES = 2 * 2**20
# Few at first, for what is read at once may be large; more where it turns out to be small.
_FIRST_BATCH = 16
_LARGEST_BATCH = 64

# Where few of the items are wanted, so many are looked at for a page.
_MOST_LOOKED_AT = 1024

# Items after a position, at most so many: each with its own position, and None in place of what is not to be told.
Fetch = Callable[[str, int], Awaitable[Sequence[tuple[str, T | None]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list; `next_token` is "" on the last."""

    items: Sequence[T]
    next_token: str


async def read_page(fetch: Fetch[T], *, query: str, size: int, token: str, is_sparse: bool = False) -> Page[T]:
    """The page that a token begins; `query` tells one list's tokens from another's.

    Args:
        is_sparse: most items may be None; then a page may be short, or empty, and not be the last.
    """
    size = catalog.page_size(size)
    after = catalog.page_start(token, query)
    items: list[T] = []
    num_bytes, num_looked_at, batch = 0, 0, _FIRST_BATCH
    while len(items) < size and num_bytes < MAX_PAGE_BYTES and num_looked_at < _MOST_LOOKED_AT:
        found = await fetch(after, batch if is_sparse else min(batch, size - len(items)))
        if not found:
            return Page(items=items, next_token="")
        for position, item in found:
            after = position
            num_looked_at += is_sparse
            if item is not None:
                items.append(item)
                num_bytes += message_bytes(item)
            if num_bytes >= MAX_PAGE_BYTES or len(items) == size:
                break
        if num_bytes < MAX_PAGE_BYTES // 8:
            batch = min(2 * batch, _LARGEST_BATCH)
    is_last = not await fetch(after, 1)
    return Page(items=items, next_token="" if is_last else catalog.page_token(query, after))


def message_bytes(item: object) -> int:
    """No less than what a dataclass takes in a message."""
    # Spelled out with all fields' names, and other than ASCII letters as escapes, it is longer than on the wire.
    return len(ascii(item))
