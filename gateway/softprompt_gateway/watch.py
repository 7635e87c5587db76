"""Keep catalogue and keyring in step with the registry: list once, then follow its changes, through outages."""

import asyncio
import random

import structlog
from softprompt_api import errors
from softprompt_api.names import shown
from softprompt_api.registry.v1.registry_pb2 import ApiKey, ListAdaptersRequest, ListKeysRequest

from softprompt_gateway.catalog import Catalog, Packed, pack
from softprompt_gateway.clients import RegistryClient
from softprompt_gateway.keyring import Keyring

_PAGE_SIZE = 1000
_MIN_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
_log = structlog.get_logger()


class CatalogWatcher:
    """Feeds a catalogue and a keyring from the registry until cancelled."""

    def __init__(self, catalog: Catalog, keyring: Keyring, registry: RegistryClient) -> None:
        self._catalog = catalog
        self._keyring = keyring
        self._registry = registry
        self._pause_s = _MIN_PAUSE_S

    async def run(self) -> None:
        """List, watch, and begin again from the last cursor whenever the registry goes away."""
        while True:
            try:
                await self._follow()
            except errors.CursorExpired:
                self._catalog.take("")
            except errors.SoftpromptError as error:
                if self._pause_s == _MIN_PAUSE_S:
                    _log.warning("registry away, serving known adapters", reason=error.reason)
            await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
            self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)

    async def _follow(self) -> None:
        if not self._catalog.cursor:
            cursor = await self._list()
            await self._list_keys()
            self._catalog.take(cursor)
        # A stream begins with a heartbeat, before any of the changes that it is there to tell.
        is_first = True
        async for event in self._registry.watch(self._catalog.cursor):
            if self._pause_s > _MIN_PAUSE_S:
                _log.info("registry watched", adapters=len(self._catalog))
            self._keyring.apply(event)
            self._pause_s = _MIN_PAUSE_S
            if self._catalog.apply(event):
                await self._ask_for_latest(event.adapter.name)
            self._catalog.take(event.cursor)
            if not is_first:
                self._keyring.hear()
            is_first = False

    async def _list(self) -> str:
        """Replace the catalogue; the cursor is the first page's, so that no change after it is missed."""
        latest: dict[str, Packed] = {}
        request, cursor = ListAdaptersRequest(page_size=_PAGE_SIZE, all_tenants=True), ""
        while True:
            page = await self._registry.list_adapters(request)
            # Packed page by page: whole messages would take much more than the catalogue itself.
            latest.update((version.name, pack(version)) for version in page.adapters)
            cursor = cursor or page.cursor
            if not page.next_page_token:
                self._catalog.replace(latest)
                return cursor
            request = ListAdaptersRequest(page_size=_PAGE_SIZE, page_token=page.next_page_token, all_tenants=True)

    async def _list_keys(self) -> None:
        """Replace the keyring; listed after the cursor was taken, so that no change is missed."""
        keys: list[ApiKey] = []
        request = ListKeysRequest(page_size=_PAGE_SIZE)
        while True:
            page = await self._registry.list_keys(request)
            keys += page.api_keys
            if not page.next_page_token:
                self._keyring.replace(keys, ever_made=page.ever_made)
                return
            request = ListKeysRequest(page_size=_PAGE_SIZE, page_token=page.next_page_token)

    async def _ask_for_latest(self, name: str) -> None:
        try:
            is_taken = False
            while not is_taken:  # what was forgotten of the name meanwhile may be later than the answer
                moment = self._catalog.moment
                is_taken = self._catalog.learn(await self._registry.get_adapter(name), asked_at=moment)
        except (errors.Unavailable, errors.DeadlineExceeded, errors.Overloaded):
            raise  # the same event comes again
        except errors.SoftpromptError as error:
            # Of a damaged one, the same event would come again for ever, and nothing after it.
            if not isinstance(error, errors.AdapterNotFound):
                _log.warning("adapter cannot be asked for", adapter=shown(name), reason=error.reason)
            self._catalog.forget(name)
