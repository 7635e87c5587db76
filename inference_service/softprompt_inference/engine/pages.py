"""Who holds which KV page: a free list, reference counts, and a cache of full pages by what they contain.

A page is free (its content means nothing), held (by one or more sequences), or idle: held by nobody, but cached
and ready to be found again. Idle pages are available too; the least recently used goes when no page is free.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from softprompt_inference.engine.keys import PageKey


class PagePool:
    """Counts references to pages; touches no memory.

    Args:
        num_pages: pages with ids 0 … num_pages − 1.
        page_size: positions in one page.
    """

    def __init__(self, *, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.num_available

    def pages_for(self, num_positions: int) -> int:
        """How many pages that many positions need."""
        return -(-num_positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, at most `num_available`, with one reference each; idle pages lose their content."""
        assert 0 <= count <= self.num_available
        page_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page_id in page_ids:
            self._references[page_id] = 1
        return page_ids

    def _evict(self) -> int:
        page_id, _ = self._idle.popitem(last=False)
        self._forget(page_id)
        return page_id

    def _forget(self, page_id: int) -> None:
        del self._page_of[self._key_of.pop(page_id)]

    def lookup(self, keys: Iterable[PageKey]) -> list[int]:
        """The cached pages of the longest prefix of `keys`, read only as far as needed; changes nothing."""
        page_ids = []
        for key in keys:
            page_id = self._page_of.get(key)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def share(self, page_ids: Iterable[int]) -> None:
        """Add a reference to each of these cached or held pages."""
        for page_id in page_ids:
            if self._references[page_id] == 0:
                del self._idle[page_id]
            self._references[page_id] += 1

    def register(self, page_id: int, key: PageKey) -> None:
        """Let a held page, now full and computed, be found by its key; the first page with a key keeps it."""
        assert self._references[page_id] > 0
        if key not in self._page_of and page_id not in self._key_of:
            self._page_of[key] = page_id
            self._key_of[page_id] = key

    def release(self, page_ids: Sequence[int], *, forget: bool = False) -> None:
        """Drop one reference to each page of a sequence.

        Args:
            page_ids: in the sequence's order; its end is evicted before its start, which more may share.
            forget: the content cannot be trusted: nobody shall find these pages again.
        """
        for page_id in reversed(page_ids):
            assert self._references[page_id] > 0
            self._references[page_id] -= 1
            if forget and page_id in self._key_of:
                self._forget(page_id)
            if self._references[page_id] > 0:
                continue
            if page_id in self._key_of:
                self._idle[page_id] = None
            else:
                self._free.append(page_id)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recompute every count from the page lists of all holders; AssertionError on any disagreement."""
        held = Counter(page_id for page_ids in holders for page_id in page_ids)
        assert all(self._references[page_id] == held[page_id] for page_id in range(self.num_pages))
        assert sorted([*self._free, *self._idle, *held]) == list(range(self.num_pages)), (
            "a page is lost or doubled"
        )
        assert self._key_of == {page_id: key for key, page_id in self._page_of.items()}
        assert set(self._idle) <= set(self._key_of), "an idle page cannot be found"
        assert not set(self._free) & set(self._key_of), "a free page can be found"
