"""Adapters on their way to the device, a piece beside each step, and the requests that wait for them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from softprompt_inference.engine.messages import AddRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coming:
    pieces: Iterator[None]
    waiting: dict[str, AddRequest] = field(default_factory=dict)


class Loading:
    """They come in one after the other; whoever does not need them does not wait."""

    def __init__(self) -> None:
        self._coming: dict[str, _Coming] = {}

    def __bool__(self) -> bool:
        return bool(self._coming)

    @property
    def first(self) -> str:
        """The digest whose turn it is."""
        return next(iter(self._coming))

    def begin(self, digest: str, pieces: Iterator[None]) -> None:
        """Let one come in: each step of `pieces` loads one."""
        self._coming[digest] = _Coming(pieces=pieces)

    def advance(self, digest: str) -> bool:
        """Load one piece; whether that was all. Raises what loading it does."""
        return next(self._coming[digest].pieces, self) is self

    def end(self, digest: str) -> list[AddRequest]:
        """Forget one, loaded or not, if it is here; the requests that waited for it, in order."""
        coming = self._coming.pop(digest, None)
        return [] if coming is None else list(coming.waiting.values())

    def keep(self, request: AddRequest) -> bool:
        """Keep a request while its first adapter that is coming comes; False: none is, and it was not kept."""
        coming = next((self._coming[digest] for digest in request.adapters if digest in self._coming), None)
        if coming is None:
            return False
        coming.waiting[request.request_id] = request
        return True

    def holds(self, request_id: str) -> bool:
        """Whether a request waits here."""
        return any(request_id in coming.waiting for coming in self._coming.values())

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        for coming in self._coming.values():
            coming.waiting.pop(request_id, None)

    def uses(self, digest: str) -> bool:
        """Whether some request that waits has this adapter."""
        return any(
            digest in request.adapters for coming in self._coming.values() for request in coming.waiting.values()
        )
