"""Sequences that cannot be queued yet: another thread compiles their grammars."""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

from softprompt_inference.engine.plan import Matcher
from softprompt_inference.engine.sequence import Sequence


class Compiling:
    """They hold no pages, and nobody waits for them."""

    def __init__(self) -> None:
        self._sequences: dict[str, tuple[Sequence, Future[Matcher]]] = {}

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def add(self, sequence: Sequence, matcher: Future[Matcher]) -> None:
        """Keep a sequence until its matcher is made."""
        self._sequences[sequence.request.request_id] = sequence, matcher

    def remove(self, request_id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
        _, matcher = self._sequences.pop(request_id, (None, None))
        if matcher is not None:
            matcher.cancel()

    def uses(self, digest: str) -> bool:
        """Whether one of them has this adapter."""
        return any(digest in sequence.adapters for sequence, _ in self._sequences.values())

    def take(self, *, wait_s: float) -> Iterator[tuple[Sequence, Future[Matcher]]]:
        """Those whose matcher was made, or failed to be; where there are none, after so many seconds at most."""
        if wait_s:
            wait([matcher for _, matcher in self._sequences.values()], wait_s, FIRST_COMPLETED)
        for request_id, (sequence, matcher) in list(self._sequences.items()):
            if matcher.done():
                del self._sequences[request_id]
                yield sequence, matcher
