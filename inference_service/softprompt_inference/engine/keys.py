"""Identity of KV pages: which pages may stand in for which.

KV of a position depends on every position up to it, so a page's key is a sha256 chain over the ids of all pages up
to it. Virtual ids are local to one process and say nothing about content; (digest, row) takes their place,
wherever they stand. A LoRA changes the KV of every position that is computed, so its digest enters the chain
before the first of them; what an adapter of keys and values gives is the same under every LoRA. The first rows of
a page have a key of their own, a partial key: they are the same whatever follows them in the page.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence

PageKey = bytes


class VirtualIds:
    """Ranges of ids above the vocabulary, each standing for the rows of one adapter; no id is ever given twice.

    Args:
        vocab_size: the first id that may be given.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._next_id = vocab_size
        self._ranges: dict[str, range] = {}
        self._key_values: set[str] = set()
        # Parallel lists in rising order: the next range always lies above all others.
        self._first_ids: list[int] = []
        self._digests: list[str] = []
        self._names: list[bytes] = []  # of 32 bytes, whatever the digests are

    def __contains__(self, digest: str) -> bool:
        return digest in self._ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def ids(self, digest: str) -> range:
        """The ids of a digest that has some."""
        return self._ranges[digest]

    def are_key_values(self, digest: str) -> bool:
        """Whether the digest's rows are keys and values, not embeddings."""
        return digest in self._key_values

    def assign(self, digest: str, num_virtual_tokens: int, *, are_key_values: bool = False) -> range:
        """Give the next ids to a digest that has none."""
        assert digest not in self._ranges
        ids = range(self._next_id, self._next_id + num_virtual_tokens)
        self._next_id = ids.stop
        self._ranges[digest] = ids
        if are_key_values:
            self._key_values.add(digest)
        self._first_ids.append(ids.start)
        self._digests.append(digest)
        self._names.append(hashlib.sha256(digest.encode()).digest())
        return ids

    def retire(self, digest: str) -> range:
        """Take the ids of a digest back, for good."""
        ids = self._ranges.pop(digest)
        self._key_values.discard(digest)
        index = bisect_right(self._first_ids, ids.start) - 1
        del self._first_ids[index], self._digests[index], self._names[index]
        return ids

    def find(self, virtual_id: int) -> tuple[bytes, range]:
        """32 bytes that name the digest which a live virtual id stands for, and all its ids."""
        index = bisect_right(self._first_ids, virtual_id) - 1
        ids = self._ranges[self._digests[index]]
        assert virtual_id in ids, "a retired virtual id is in use"
        return self._names[index], ids


def root_key(salt: str) -> PageKey:
    """What the first page of a sequence is chained to; requests with different salts share nothing."""
    return hashlib.sha256(b"softprompt page chain 1\0" + salt.encode("utf-8", "surrogatepass")).digest()


def under_lora(parent: PageKey, lora: str) -> PageKey:
    """What a page that follows the page `parent` is chained to where a LoRA computes it, or some of its rows."""
    return hashlib.sha256(b"under a LoRA\0" + parent + hashlib.sha256(lora.encode()).digest()).digest()


def page_key(parent: PageKey, token_ids: Sequence[int], virtual_ids: VirtualIds) -> PageKey:
    """Key of a full page of `token_ids` that follows the page `parent`."""
    chain = hashlib.sha256(parent)
    if max(token_ids) < virtual_ids.vocab_size:
        chain.update(array("q", token_ids).tobytes())
        return chain.digest()
    # A text id is 8 bytes ≥ 0; rows of an adapter that follow one another are 8 bytes < 0, their number in 8, and
    # its digest in 32: no two pages read alike.
    start = 0
    while start < len(token_ids):
        first = token_ids[start]
        if first < virtual_ids.vocab_size:
            chain.update(array("q", (first,)).tobytes())
            start += 1
            continue
        name, ids = virtual_ids.find(first)
        stop = start + 1
        while stop < len(token_ids) and token_ids[stop] == first + stop - start < ids.stop:
            stop += 1
        chain.update(array("q", (ids.start - first - 1, stop - start)).tobytes() + name)
        start = stop
    return chain.digest()


def partial_key(parent: PageKey, token_ids: Sequence[int], virtual_ids: VirtualIds) -> PageKey:
    """Key of the first rows, `token_ids`, of a page that follows the page `parent`; never that of a full page."""
    return page_key(b"first rows of a page\0" + parent, token_ids, virtual_ids)
