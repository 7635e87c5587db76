"""The API keys that the registry has told of, and for how long they are good without hearing from it."""

import asyncio
import time
from collections.abc import Iterable

from softprompt_api.errors import Unavailable
from softprompt_api.registry.v1.registry_pb2 import AdapterEventType, ApiKey, WatchAdaptersResponse


class Keyring:
    """API keys by their sha256, as the registry's list and its changes tell them.

    Args:
        trust_s: how long after the registry was last heard of they are believed.
    """

    def __init__(self, *, trust_s: float) -> None:
        self._trust_s = trust_s
        self._keys: dict[str, ApiKey] = {}
        self._ever_made = False
        self._heard_s = 0.0
        self._listed = asyncio.Event()

    def replace(self, keys: Iterable[ApiKey], *, ever_made: bool) -> None:
        """Take the registry's whole list."""
        self._keys = {key.sha256: key for key in keys}
        self._ever_made = ever_made
        self.hear()
        self._listed.set()

    def hear(self) -> None:
        """The registry was heard of: until now all its changes are known."""
        self._heard_s = time.monotonic()

    def apply(self, event: WatchAdaptersResponse) -> None:
        """Take one event; those that are not about keys change nothing."""
        if event.type == AdapterEventType.ADAPTER_EVENT_TYPE_KEY_CREATED:
            self._keys[event.key.sha256] = event.key
            self._ever_made = True
        elif event.type == AdapterEventType.ADAPTER_EVENT_TYPE_KEY_REVOKED:
            self._keys.pop(event.key.sha256, None)
            self._ever_made = True  # its creation may not have been heard of

    def find(self, sha256: str) -> ApiKey | None:
        """The key with this sha256, if the registry has told of it."""
        return self._keys.get(sha256)

    @property
    def is_listed(self) -> bool:
        """Whether the registry has told which keys there are."""
        return self._listed.is_set()

    async def wait_until_listed(self) -> None:
        """Return once it has."""
        await self._listed.wait()

    @property
    def was_any_made(self) -> bool:
        """Whether there was ever a key; not to be asked before keys are listed."""
        assert self.is_listed, "what was not told yet is not taken for no key"
        return self._ever_made

    def check_heard(self) -> None:
        """Raise Unavailable where the registry has not been heard of for too long."""
        if time.monotonic() - self._heard_s > self._trust_s:
            raise Unavailable("API keys cannot be checked: the registry has been away for too long; try again")
