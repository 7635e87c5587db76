"""Parsed adapters in host memory, the least recently used of them forgotten first."""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import chain

from softprompt_inference.adapters.adapter import Adapter


class HostCache:
    """Adapters by digest within a limit of bytes. An adapter larger than the limit is not kept.

    Beside them, whatever their size, those in hand: they stay until they are handed out or let go.

    Args:
        capacity_bytes: most bytes of rows and matrices; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._size_bytes = 0  # of those within the limit
        self._in_hand: OrderedDict[str, Adapter] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._size_bytes + sum(self._in_hand[digest].size_bytes for digest in self._beside())

    def __len__(self) -> int:
        return len(self._adapters) + len(self._beside())

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters or digest in self._in_hand

    def _beside(self) -> list[str]:
        return [digest for digest in self._in_hand if digest not in self._adapters]

    def peek(self, digest: str) -> Adapter | None:
        """The adapter, without counting it as used; None when it is not held."""
        return self._adapters.get(digest) or self._in_hand.get(digest)

    def get(self, digest: str) -> Adapter | None:
        """The adapter, now the most recently used; None when it is not held."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter or self._in_hand.get(digest)

    def put(self, adapter: Adapter) -> None:
        """Hold an adapter, and forget others where it needs their room."""
        if adapter.digest in self._adapters or adapter.size_bytes > self._capacity_bytes:
            return
        self._adapters[adapter.digest] = adapter
        self._size_bytes += adapter.size_bytes
        while self._size_bytes > self._capacity_bytes:
            _, forgotten = self._adapters.popitem(last=False)
            self._size_bytes -= forgotten.size_bytes

    def discard(self, digest: str) -> bool:
        """Forget an adapter; False when it is not held."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._size_bytes -= adapter.size_bytes
        return adapter is not None

    def hold(self, adapter: Adapter) -> None:
        """Have an adapter in hand."""
        self._in_hand[adapter.digest] = adapter

    def take_up(self, digest: str) -> bool:
        """Have an adapter in hand; False when it is not held."""
        adapter = self.get(digest)
        if adapter is not None:
            self.hold(adapter)
        return adapter is not None

    def hand_out(self, digest: str) -> Adapter:
        """An adapter that is in hand, and is so no longer."""
        return self._in_hand.pop(digest)

    def let_go(self, digest: str) -> None:
        """Have an adapter in hand no longer, if it is."""
        self._in_hand.pop(digest, None)

    def let_go_but(self, digests: Collection[str], *, num_others: int) -> None:
        """Have in hand no longer what is not one of these, but so many others that were taken last."""
        others = [digest for digest in self._in_hand if digest not in digests]
        for digest in others[: max(0, len(others) - num_others)]:
            del self._in_hand[digest]

    def in_hand(self) -> Iterator[str]:
        """Digests of what is in hand."""
        return iter(self._in_hand)

    def digests(self) -> Iterator[str]:
        """Of what is held, the most recently used first."""
        return chain(self._beside(), reversed(self._adapters))

    def check(self) -> None:
        """Assert that the counters agree with what is held."""
        assert self._size_bytes == sum(adapter.size_bytes for adapter in self._adapters.values())
        assert self._size_bytes <= self._capacity_bytes
        assert all(digest == held.digest for digest, held in chain(self._adapters.items(), self._in_hand.items()))
