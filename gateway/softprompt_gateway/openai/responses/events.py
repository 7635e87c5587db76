"""The events of one response stream as bytes, numbered in order."""

from collections.abc import Mapping
from typing import Any

import orjson


def opening(kind: str, members: Mapping[str, Any]) -> bytes:
    """An event up to its last members, to be told once or often."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **members})[:-1]


class Events:
    """Events that were told and not yet taken."""

    def __init__(self) -> None:
        self._told: list[bytes] = []
        self._number = 0

    def tell(self, kind: str, members: Mapping[str, Any]) -> None:
        """Add an event."""
        self.tell_opened(opening(kind, members))

    def tell_opened(self, *parts: bytes) -> None:
        """Add an event by its `opening`, and what follows in it."""
        self._told += (*parts, b',"sequence_number":%d}\n\n' % self._number)
        self._number += 1

    def take(self) -> bytes:
        """What was told since the last look."""
        taken = b"".join(self._told)
        self._told.clear()
        return taken


class Unheard(Events):
    """Events of an answer that is told as a whole."""

    def tell(self, kind: str, members: Mapping[str, Any]) -> None:
        """Tell nobody."""

    def tell_opened(self, *parts: bytes) -> None:
        """Tell nobody."""
