"""Who holds which KV page: a free list, reference counts, and a cache of pages by what they contain.

A page is free (its content means nothing), held (by one or more sequences), or idle: held by nobody, but cached
and ready to be found again. Idle pages are available too; the least recently used goes when no page is free.

A page may be found by several keys: one for all its rows once it is full, and one for each number of first rows
that may be copied from it. What was computed in a row stays until the page is given away, so the rows that a key
stands for are right as long as the page has the key, whatever its holder writes behind them.
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
        self._keys_of: dict[int, list[PageKey]] = {}

    def __contains__(self, key: PageKey) -> bool:
        return key in self._page_of

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
        for key in self._keys_of.pop(page_id, ()):
            del self._page_of[key]

    def lookup(self, keys: Iterable[PageKey]) -> list[int]:
        """The cached pages of the longest prefix of `keys`, read only as far as needed; changes nothing."""
        page_ids = []
        for key in keys:
            page_id = self._page_of.get(key)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def num_idle(self, page_ids: Iterable[int]) -> int:
        """How many of these pages are idle: sharing them leaves so many fewer available."""
        return sum(page_id in self._idle for page_id in page_ids)

    def share(self, page_ids: Iterable[int]) -> None:
        """Add a reference to each of these cached or held pages."""
        for page_id in page_ids:
            if self._references[page_id] == 0:
                del self._idle[page_id]
            self._references[page_id] += 1

    def register(self, page_id: int, key: PageKey) -> None:
        """Let a held page, now full and computed, be found by its key; the first page with a key keeps it."""
        assert self._references[page_id] > 0
        if key not in self._page_of:
            self._add_key(page_id, key)

    def register_partial(self, page_id: int, key: PageKey) -> None:
        """Let the first rows of a held page, now computed, be found by a partial key.

        The newest page with such a key takes it: nobody shares the page for its first rows, so the page of the
        newest user is the one that is held, and then idle, the longest.
        """
        assert self._references[page_id] > 0
        former = self._page_of.get(key)
        if former == page_id:
            return
        if former is not None:
            self._remove_key(former, key)
        self._add_key(page_id, key)

    def _add_key(self, page_id: int, key: PageKey) -> None:
        self._page_of[key] = page_id
        self._keys_of.setdefault(page_id, []).append(key)

    def _remove_key(self, page_id: int, key: PageKey) -> None:
        del self._page_of[key]
        self._keys_of[page_id].remove(key)
        if self._keys_of[page_id]:
            return
        del self._keys_of[page_id]
        if page_id in self._idle:
            del self._idle[page_id]
            self._free.append(page_id)

    def release(self, page_ids: Sequence[int], *, forget: bool = False) -> None:
        """Drop one reference to each page of a sequence.

        Args:
            page_ids: in the sequence's order; its end is evicted before its start, which more may share.
            forget: the content cannot be trusted: nobody shall find these pages again.
        """
        for page_id in reversed(page_ids):
            assert self._references[page_id] > 0
            self._references[page_id] -= 1
            if forget:
                self._forget(page_id)
            if self._references[page_id] > 0:
                continue
            if page_id in self._keys_of:
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
        pairs = [(key, page_id) for page_id, keys in self._keys_of.items() for key in keys]
        assert len(pairs) == len(self._page_of)
        assert dict(pairs) == self._page_of
        assert all(self._keys_of.values()), "a page has a list of keys without a key"
        assert set(self._idle) <= set(self._keys_of), "an idle page cannot be found"
        assert not set(self._free) & set(self._keys_of), "a free page can be found"
