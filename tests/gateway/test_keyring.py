"""The keyring's rules, without a registry."""

import asyncio

import pytest
from softprompt_api.errors import Unavailable
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_gateway import keyring as module
from softprompt_gateway.keyring import Keyring

CREATED, REVOKED = reg.ADAPTER_EVENT_TYPE_KEY_CREATED, reg.ADAPTER_EVENT_TYPE_KEY_REVOKED


def _key(letter: str) -> reg.ApiKey:
    return reg.ApiKey(id=f"key-{letter * 12}", sha256=letter * 64)


def _event(kind: int, letter: str) -> reg.WatchAdaptersResponse:
    return reg.WatchAdaptersResponse(type=kind, key=_key(letter))


async def test_a_listed_key_is_found_until_it_is_revoked() -> None:
    keyring = Keyring(trust_s=60)
    keyring.replace([_key("a"), _key("b")], ever_made=True)
    keyring.apply(_event(REVOKED, "a"))
    keyring.apply(_event(REVOKED, "c"))
    assert keyring.find("a" * 64) is None
    assert keyring.find("b" * 64) == _key("b")
    assert keyring.was_any_made


async def test_the_first_key_is_told_of_by_an_event() -> None:
    keyring = Keyring(trust_s=60)
    keyring.replace([], ever_made=False)
    assert not keyring.was_any_made
    keyring.apply(_event(CREATED, "a"))
    assert keyring.was_any_made
    assert keyring.find("a" * 64) == _key("a")


async def test_a_key_that_is_only_heard_of_when_it_is_revoked_was_made() -> None:
    keyring = Keyring(trust_s=60)
    keyring.replace([], ever_made=False)
    keyring.apply(_event(REVOKED, "a"))
    assert keyring.was_any_made


async def test_a_new_list_replaces_what_was_known() -> None:
    keyring = Keyring(trust_s=60)
    keyring.replace([_key("a")], ever_made=True)
    keyring.replace([_key("b")], ever_made=True)
    assert keyring.find("a" * 64) is None


async def test_events_about_adapters_change_nothing() -> None:
    keyring = Keyring(trust_s=60)
    keyring.replace([], ever_made=False)
    keyring.apply(reg.WatchAdaptersResponse(type=reg.ADAPTER_EVENT_TYPE_REGISTERED))
    assert not keyring.was_any_made


async def test_nothing_is_known_before_the_first_list() -> None:
    keyring = Keyring(trust_s=60)
    waiting = asyncio.create_task(keyring.wait_until_listed())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.01)
    assert not keyring.is_listed
    with pytest.raises(AssertionError):
        _ = keyring.was_any_made
    keyring.replace([], ever_made=False)
    await waiting
    assert keyring.is_listed


async def test_keys_are_trusted_for_a_while_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    keyring = Keyring(trust_s=60)
    keyring.replace([_key("a")], ever_made=True)
    now += 60
    keyring.check_heard()
    now += 1
    with pytest.raises(Unavailable, match="away for too long"):
        keyring.check_heard()
    keyring.hear()
    keyring.check_heard()
