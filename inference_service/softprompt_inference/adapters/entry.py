"""What residency keeps of each adapter, and of each request that waits for some."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from softprompt_inference.adapters.adapter import AdapterInfo
from softprompt_inference.adapters.room import Room


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """An adapter that requests ask for, or that is resident.

    Attributes:
        found: what is known of it, since it was first fetched.
        fetching: the last task that fetched it.
        tenant: whose request is the reason to fetch it.
        num_asking: requests that use it, or wait for it or for another beside it.
        num_using: requests that use it, and keep it resident.
        is_resident: whether it has room on the device.
        has_failed: whether the engine could not put it there, and is to try again.
        waiters: requests in line for it.
    """

    digest: str
    tenant: str = ""
    found: AdapterInfo | None = None
    fetching: "asyncio.Task[None] | None" = None
    num_asking: int = 0
    num_using: int = 0
    is_resident: bool = False
    has_failed: bool = False
    waiters: "dict[Waiter, None]" = field(default_factory=dict)

    @property
    def info(self) -> AdapterInfo:
        """What is known of it; it must have been fetched."""
        assert self.found is not None
        return self.found

    @property
    def num_rows(self) -> int:
        """Its virtual tokens."""
        return self.info.num_virtual_tokens

    @property
    def is_ready(self) -> bool:
        """Whether the engine has it."""
        return self.is_resident and not self.has_failed

    @property
    def is_coming(self) -> bool:
        """Whether it is being fetched."""
        return self.fetching is not None and not self.fetching.done()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiter:
    """A request in line for all rooms in which it has adapters; `turn` is done when it holds all of them.

    Attributes:
        is_short: whether the engine did not have all of them when it came.
    """

    tenant: str
    entries: Sequence[Entry]
    rooms: Sequence[Room]
    turn: "asyncio.Future[None]"
    since_s: float
    is_short: bool

    @property
    def missing(self) -> list[Entry]:
        """What the engine does not have."""
        return [entry for entry in self.entries if not entry.is_ready]
