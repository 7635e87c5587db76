"""How the watcher gets past what it cannot read, and when it has heard of the registry."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from softprompt_api.access import Scope
from softprompt_api.errors import Unavailable
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import RegistryClient
from softprompt_gateway.disconnect import stop
from softprompt_gateway.keyring import Keyring
from softprompt_gateway.watch import CatalogWatcher

HEARTBEAT = reg.WatchAdaptersResponse(type=reg.ADAPTER_EVENT_TYPE_HEARTBEAT, cursor="1")
DELETED = reg.WatchAdaptersResponse(
    type=reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, adapter=reg.AdapterVersion(name="a", version=1), cursor="2"
)


async def test_a_damaged_adapter_keeps_no_later_event_away(stack: Any, logged: list[Any]) -> None:
    key = await stack.registry.keys.make(Scope.ADAPTERS_READ)
    for _ in range(2):
        await stack.registry.add("a")
    headers = {"authorization": f"Bearer {key}"}
    stack.registry.damaged.add("a")
    await stack.registry.DeleteVersion(reg.DeleteVersionRequest(name="a", version=2), None)
    await stack.registry.keys.revoke(key)
    async with asyncio.timeout(5):
        while (await stack.http.get("/v1/models", headers=headers)).status_code != 401:
            pass
    assert [line["adapter"] for line in logged if line["event"] == "adapter cannot be asked for"] == ["'a'"]


class _Keyring(Keyring):
    """Counts how often the registry was heard of on a watch."""

    times_heard = 0

    def hear(self) -> None:
        super().hear()
        self.times_heard += 1


class _Registry:
    """Has nothing; its watches tell these events and break off, and those after them stay open."""

    def __init__(self, *watches: Sequence[reg.WatchAdaptersResponse]) -> None:
        self._watches = list(watches)
        self.over = asyncio.Event()

    async def list_adapters(self, _request: Any) -> reg.ListAdaptersResponse:
        return reg.ListAdaptersResponse(cursor="1")

    async def list_keys(self, _request: Any) -> reg.ListKeysResponse:
        return reg.ListKeysResponse()

    async def get_adapter(self, _spelling: str) -> reg.AdapterVersion:
        raise Unavailable("away")

    async def watch(self, _cursor: str) -> AsyncIterator[reg.WatchAdaptersResponse]:
        if not self._watches:
            self.over.set()
            await asyncio.Event().wait()
        for event in self._watches.pop(0):
            yield event
        raise Unavailable("away")


@pytest.mark.parametrize(
    ("watches", "times_heard"),
    [
        ([[HEARTBEAT]] * 3, 0),
        ([[HEARTBEAT, DELETED]] * 3, 0),  # never taken: the latest of its name cannot be asked for
        ([[HEARTBEAT, HEARTBEAT]] * 3, 3),
    ],
)
async def test_keys_are_trusted_anew_by_what_follows_a_watchs_first_heartbeat(
    watches: Any, times_heard: int
) -> None:
    keyring, registry = _Keyring(trust_s=60), _Registry(*watches)
    watching = asyncio.create_task(CatalogWatcher(Catalog(), keyring, cast(RegistryClient, registry)).run())
    async with asyncio.timeout(10):
        await registry.over.wait()
    await stop(watching)
    assert keyring.times_heard == times_heard + 1  # and by the list
