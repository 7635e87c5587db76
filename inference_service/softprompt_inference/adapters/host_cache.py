"""Parsed adapters in host memory, the least recently used of them forgotten first."""

from collections import OrderedDict
from collections.abc import Iterator

from softprompt_inference.adapters.adapter import Adapter


class HostCache:
    """Adapters by digest within a limit of bytes. An adapter larger than the limit is not kept.

    Args:
        capacity_bytes: most bytes of rows and matrices; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def peek(self, digest: str) -> Adapter | None:
        """The adapter, without counting it as used; None when it is not held."""
        return self._adapters.get(digest)

    def get(self, digest: str) -> Adapter | None:
        """The adapter, now the most recently used; None when it is not held."""
        adapter = self._adapters.get(digest)
        if adapter is not None:
            self._adapters.move_to_end(digest)
        return adapter

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

    def digests(self) -> Iterator[str]:
        """Of what is held, the most recently used first."""
        return reversed(self._adapters)

    def check(self) -> None:
        """Assert that the counters agree with what is held."""
        assert self._size_bytes == sum(adapter.size_bytes for adapter in self._adapters.values())
        assert self._size_bytes <= self._capacity_bytes
        assert all(digest == adapter.digest for digest, adapter in self._adapters.items())
