"""The catalogue's rules, and how the watcher keeps it in step."""

import asyncio
import hashlib
from dataclasses import replace
from typing import Any, cast

import pytest
from softprompt_api.names import AdapterRef, parse_adapter
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_gateway.catalog import Catalog, pack
from softprompt_gateway.clients import RegistryClient
from softprompt_gateway.keyring import Keyring
from softprompt_gateway.watch import CatalogWatcher


def _version(name: str, number: int, *, revision: int = 0, aliases: Any = ("latest",)) -> reg.AdapterVersion:
    digest = f"sha256:{ord(name[0]):032x}{number:032x}"
    return reg.AdapterVersion(
        name=name, version=number, digest=digest, revision=revision or number, aliases=aliases
    )


def _list(catalog: Catalog, *versions: reg.AdapterVersion) -> None:
    catalog.replace({version.name: pack(version) for version in versions})


def _event(kind: Any, version: reg.AdapterVersion, alias: str = "") -> reg.WatchAdaptersResponse:
    return reg.WatchAdaptersResponse(type=kind, adapter=version, alias=alias)


def _found(catalog: Catalog, spelling: str) -> reg.AdapterVersion | None:
    ref = parse_adapter(spelling)
    return catalog.find(replace(ref, owner="default") if ref.digest else ref)


def test_a_registered_version_is_found_by_every_spelling() -> None:
    catalog, version = Catalog(), _version("a", 1)
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, version))
    for spelling in ("a", "a@1", "a@latest", version.digest):
        assert _found(catalog, spelling) == version


def test_a_listed_version_is_found_by_every_spelling() -> None:
    catalog, version = Catalog(), _version("a", 1)
    assert not catalog.synced
    _list(catalog, version)
    assert catalog.synced
    for spelling in ("a", "a@1", version.digest):
        assert _found(catalog, spelling) == version


def test_its_state_is_another_one_whenever_something_else_is_known() -> None:
    catalog, first, second = Catalog(), _version("a", 1), _version("a", 2, aliases=("latest", "stable"))
    seen = [catalog.state]
    for change in (
        lambda: _list(catalog, first),
        lambda: catalog.learn(first),  # by its other spellings
        lambda: catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, second)),
        lambda: catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_REMOVED, second, "stable")),
        lambda: catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, second)),
        lambda: catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ADAPTER_DELETED, second)),
        lambda: _list(catalog),
    ):
        change()
        assert catalog.state not in seen
        seen.append(catalog.state)
    catalog.learn(first)
    state = catalog.state
    catalog.learn(first)
    assert catalog.state == state


def test_an_event_that_comes_late_does_not_bring_an_old_version_back() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 2))
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, _version("a", 1)))
    assert _found(catalog, "a") == _version("a", 2)


def test_a_rollback_brings_an_old_version_back_and_an_event_from_before_it_does_not_undo_it() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 2))
    rolled_back = _version("a", 1, revision=3)
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_SET, rolled_back, "latest"))
    assert _found(catalog, "a") == rolled_back
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, _version("a", 2)))
    assert _found(catalog, "a") == rolled_back
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, _version("a", 3, revision=4)))
    assert _found(catalog, "a") == _version("a", 3, revision=4)


def test_an_alias_is_found_where_it_was_last_heard_to_point() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 2, aliases=("latest", "prod")))
    assert _found(catalog, "a@prod") == _version("a", 2, aliases=("latest", "prod"))
    moved = _version("a", 1, revision=3, aliases=("prod",))
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_SET, moved, "prod"))
    catalog.learn(_version("a", 2, aliases=("latest", "prod")))  # an answer from before
    assert _found(catalog, "a@prod") == moved
    assert _found(catalog, "a") == _version("a", 2, aliases=("latest", "prod"))
    assert _found(catalog, "a@beta") is None
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_REMOVED, reg.AdapterVersion(name="a"), "prod"))
    assert _found(catalog, "a@prod") is None


def test_a_deleted_name_takes_its_aliases_along() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1, aliases=("latest", "prod")))
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ADAPTER_DELETED, reg.AdapterVersion(name="a")))
    assert _found(catalog, "a@prod") is None


def test_older_versions_stay_usable_by_number() -> None:
    catalog = Catalog()
    for number in (1, 2):
        catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, _version("a", number)))
    assert _found(catalog, "a@1") == _version("a", 1)


def test_deleting_the_latest_version_asks_for_the_one_before() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1))
    catalog.learn(_version("a", 2))
    assert catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, _version("a", 2)))
    assert _found(catalog, "a@2") is None
    assert _found(catalog, _version("a", 2).digest) is None


def test_a_name_whose_latest_version_is_not_known_is_asked_for_again() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 2))
    deleted = _event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, _version("a", 2))
    assert catalog.apply(deleted)
    assert catalog.apply(deleted)
    catalog.learn(_version("a", 1, revision=3))
    assert not catalog.apply(deleted)


def test_a_whole_list_takes_the_place_of_all_that_was_known() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1, aliases=("latest", "prod")))
    _list(catalog, _version("a", 2))
    for spelling in ("a@prod", "a@1", _version("a", 1).digest):
        assert _found(catalog, spelling) is None
    assert _found(catalog, "a") == _version("a", 2)


def test_deleting_an_older_version_changes_nothing_else() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1))
    catalog.learn(_version("a", 2))
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, _version("a", 1)))
    assert _found(catalog, "a@1") is None
    assert _found(catalog, "a") == _version("a", 2)


def test_a_deleted_name_is_gone_in_every_spelling() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1))
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ADAPTER_DELETED, reg.AdapterVersion(name="a")))
    for spelling in ("a", "a@1", _version("a", 1).digest):
        assert _found(catalog, spelling) is None


def test_a_version_that_cannot_be_told_takes_all_of_its_name_along() -> None:
    catalog = Catalog()
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, _version("a", 1)))
    untold = reg.AdapterVersion(name="a", version=2)
    assert catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_SET, untold, "prod"))  # the latest must be asked for
    for spelling in ("a", "a@1"):
        assert _found(catalog, spelling) is None


async def test_it_moves_with_the_changes_that_are_taken() -> None:
    catalog = Catalog()
    catalog.take("1-0")
    await catalog.wait_beyond("", patience_s=60)
    await catalog.wait_beyond("1-0", patience_s=0)
    moving = asyncio.create_task(catalog.wait_beyond("1-0", patience_s=60))
    for cursor in ("1-0", "2-0"):  # a heartbeat, and a change
        assert not moving.done()
        catalog.take(cursor)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await moving


def test_a_heartbeat_changes_nothing() -> None:
    catalog = Catalog()
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_HEARTBEAT, reg.AdapterVersion()))
    assert len(catalog) == 0


def test_names_are_in_order() -> None:
    catalog = Catalog()
    _list(catalog, _version("b", 1), _version("a", 1))
    assert [version.name for version in catalog.versions()] == ["a", "b"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_gateway.catalog._MAX_REMEMBERED", 4)
    catalog = Catalog()
    for number in range(1, 10):
        catalog.learn(_version("a", number))
    assert catalog.find(AdapterRef(name="a", version=1)) is None
    assert catalog.find(AdapterRef(name="a", version=9)) == _version("a", 9)


def test_near_names_are_suggested() -> None:
    catalog = Catalog()
    _list(catalog, _version("tweet_adapter", 1), _version("sms_spam", 1))
    assert catalog.near("tweet_adaptor") == "tweet_adapter"
    assert catalog.near("zzz") == ""
    assert catalog.near("x" * 1_000_000) == ""


def test_names_stay_in_order_as_they_come_and_go() -> None:
    catalog = Catalog()
    for name in "dbca":
        catalog.learn(_version(name, 1))
    catalog.forget("b")
    catalog.learn(_version("d", 2))
    assert [version.name for version in catalog.versions()] == ["a", "c", "d"]
    assert len(catalog) == 3


def test_a_version_is_kept_without_what_nobody_asks_the_catalogue_for() -> None:
    catalog, version = Catalog(), _version("a", 1)
    version.base_model.id, version.base_model.hidden_size = "acme/tiny-1", 16
    version.base_model.tokenizer_sha256, version.base_model.no_key_values = "x" * 64, "y" * 1000
    version.config_json, version.labels["note"] = "x" * 1_000_000, "y" * 256
    assert len(pack(version)) < 400
    catalog.learn(version)
    found = _found(catalog, "a")
    assert found is not None
    assert (found.digest, found.config_json) == (version.digest, "")
    # Models that share an id are told apart by their shapes.
    assert found.base_model == reg.BaseModel(id="acme/tiny-1", hidden_size=16)
    assert version.config_json  # what was learned from is left as it was


def test_a_near_name_is_found_among_many() -> None:
    catalog = Catalog()
    names = [hashlib.sha256(bytes([*divmod(number, 256)])).hexdigest()[:12] for number in range(5_000)]
    _list(catalog, *(_version(name, 1) for name in names))
    assert catalog.near(names[4321][:-1] + "z") == names[4321]


def test_an_answer_from_before_a_deletion_does_not_bring_the_name_back() -> None:
    catalog, version = Catalog(), _version("a", 1)
    moment = catalog.moment
    catalog.forget("a")
    catalog.learn(version, asked_at=moment)
    assert _found(catalog, "a") is None
    catalog.learn(version, asked_at=catalog.moment)
    assert _found(catalog, "a") == version
    _list(catalog)
    catalog.learn(version, asked_at=catalog.moment - 1)
    assert _found(catalog, "a") is None


def test_an_answer_from_before_a_deletion_takes_nothing_away_that_came_after_it() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1, aliases=("latest", "prod")))
    moment = catalog.moment
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ADAPTER_DELETED, reg.AdapterVersion(name="a")))
    catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_REGISTERED, made := _version("a", 2, aliases=("latest", "prod"))))
    catalog.forget("a", asked_at=moment)
    catalog.forget_alias("a", "prod", asked_at=moment)
    assert _found(catalog, "a") == _found(catalog, "a@prod") == made
    catalog.forget_alias("a", "prod", asked_at=catalog.moment)
    assert _found(catalog, "a@prod") is None
    catalog.forget("a", asked_at=catalog.moment)
    assert _found(catalog, "a") is None


def test_of_versions_that_are_deleted_at_the_same_time_none_stays() -> None:
    catalog = Catalog()
    for number in (1, 2, 3):
        catalog.learn(_version("a", number))
    moment = catalog.moment
    for number in (1, 3):
        catalog.forget("a", number, asked_at=moment)
    assert _found(catalog, "a@1") is _found(catalog, "a@3") is _found(catalog, "a") is None
    assert list(catalog.versions()) == []
    assert _found(catalog, "a@2") is not None


def test_an_answer_from_before_an_alias_was_dropped_for_room_does_not_bring_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("softprompt_gateway.catalog._MAX_REMEMBERED", 3)
    catalog, before = Catalog(), _version("a", 1, aliases=("prod",))
    moment = catalog.moment
    catalog.learn(_version("a", 2, revision=3, aliases=("prod",)))
    for name in "bc":
        catalog.learn(_version(name, 1))
    assert _found(catalog, "a@prod") is None
    catalog.learn(before, asked_at=moment)
    assert _found(catalog, "a@prod") is None


def test_an_alias_that_has_moved_on_since_its_event_is_not_believed() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1, aliases=("latest", "prod")))
    moved = _version("a", 2, revision=4, aliases=())  # it is on its third version by now
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_ALIAS_SET, moved, "prod"))
    assert _found(catalog, "a@prod") is None
    assert _found(catalog, "a@2") == moved
    assert _found(catalog, "a") is not None


@pytest.mark.parametrize(
    ("kind", "alias"),
    [(reg.ADAPTER_EVENT_TYPE_REGISTERED, ""), (reg.ADAPTER_EVENT_TYPE_ALIAS_SET, "latest")],
)
def test_where_the_latest_has_moved_on_since_its_event_it_is_asked_for(kind: Any, alias: str) -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1))
    assert catalog.apply(_event(kind, _version("a", 2, revision=4, aliases=()), alias))
    assert not catalog.apply(_event(kind, _version("a", 3, revision=4), alias))
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_UPDATED, _version("a", 2, revision=4, aliases=())))


async def test_the_latest_is_asked_for_until_nothing_of_the_name_was_forgotten_meanwhile() -> None:
    """Under a lease nobody would ask again: as where an alias of it was dropped for room."""
    catalog, asked = Catalog(), []
    catalog.learn(_version("a", 1))

    class Registry:
        async def get_adapter(self, name: str) -> reg.AdapterVersion:
            asked.append(name)
            if len(asked) == 1:
                catalog.forget_alias("a", "prod")
            return _version("a", 1 + len(asked))

    watcher = CatalogWatcher(catalog, Keyring(trust_s=60), cast(RegistryClient, Registry()))
    await watcher._ask_for_latest("a")
    assert asked == ["a", "a"]
    assert _found(catalog, "a") == _version("a", 3)


def test_a_deleted_version_that_was_the_latest_unknown_to_us_has_another_one_asked_for() -> None:
    catalog = Catalog()
    catalog.learn(_version("a", 1, revision=5))
    deleted = reg.AdapterVersion(name="a", version=4)
    assert catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, deleted, "latest"))
    assert not catalog.apply(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, deleted))


def test_of_very_many_deleted_names_each_stays_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_gateway.catalog._MAX_REMEMBERED", 4)
    catalog = Catalog()
    moment = catalog.moment
    for name in "abcdefgh":
        catalog.forget(name)
    for name in "abcdefgh":
        catalog.learn(_version(name, 1), asked_at=moment)
    assert len(catalog) == 0
    for name in "bh":
        catalog.learn(_version(name, 1), asked_at=catalog.moment)
    assert len(catalog) == 2


def test_a_digest_is_found_under_a_name_that_may_be_used() -> None:
    catalog, older = Catalog(), _version("a", 1)
    newer = _version("b", 1)
    newer.digest = older.digest
    for version in (newer, older):
        catalog.learn(version)
    ref = replace(parse_adapter(older.digest), owner="default")
    for name, version in (("a", older), ("b", newer)):
        assert catalog.find(ref, {name}.__contains__) == version
    assert catalog.find(ref, set[str]().__contains__) is None


async def test_the_watcher_catches_up_after_an_outage(stack: Any) -> None:
    await stack.registry.add("a")
    await stack.until_listed("a")
    address = stack.services["registry"].port
    await stack.services["registry"].stop(0)
    await stack.registry.add("b")
    await stack.restart_registry(address)
    await stack.until_listed("a", "b")


async def test_the_watcher_asks_again_for_what_it_could_not_be_told(stack: Any, logged: list[Any]) -> None:
    for _ in range(2):
        await stack.registry.add("a")
    await stack.until_listed("a")
    stack.registry.answers.clear()
    await stack.registry.DeleteVersion(reg.DeleteVersionRequest(name="a", version=2), None)
    async with asyncio.timeout(5):
        while not stack.registry.asked:
            await stack.http.get("/health/live")
    address = stack.services["registry"].port
    await stack.services["registry"].stop(0)
    stack.registry.answers.set()
    async with asyncio.timeout(10):
        while not any("registry away" in line["event"] for line in logged):
            await stack.http.get("/health/live")
    await stack.restart_registry(address)
    await stack.until_listed("a")


async def test_a_version_that_was_deleted_here_leaves_the_one_before(stack: Any) -> None:
    for _ in range(2):
        await stack.registry.add("a")
    await stack.until_listed("a")
    stack.registry.silent = True
    assert (await stack.http.delete("/v1/adapters/a@2")).status_code == 200
    assert await stack.listed() == [stack.base]
    await stack.registry.tell(_event(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, _version("a", 2)))
    await stack.until_listed("a")


async def test_the_watcher_lists_again_when_its_cursor_has_expired(stack: Any) -> None:
    await stack.registry.add("a")
    await stack.until_listed("a")
    address = stack.services["registry"].port
    await stack.services["registry"].stop(0)
    # As if the events had been trimmed: what happened meanwhile is in the list only.
    await stack.registry.add("b")
    stack.registry.log.clear()
    stack.registry.expired_cursors = 1
    await stack.restart_registry(address)
    await stack.until_listed("a", "b")
    assert stack.registry.lists >= 2


def test_tenants_share_neither_names_nor_digests() -> None:
    catalog = Catalog()
    for name in ("acme/a", "a", "umbrella/a"):
        catalog.learn(_version(name, 1))
    digest = _version("a", 1).digest
    assert catalog.find(AdapterRef(digest=digest, owner="default")) == _version("a", 1)
    assert catalog.find(AdapterRef(digest=_version("umbrella/a", 1).digest, owner="default")) is None
    listed = catalog.versions(lambda name: name.startswith("acme/"))
    assert [version.name for version in listed] == ["acme/a"]


def test_a_near_name_is_one_of_the_tenants_as_it_calls_it() -> None:
    catalog = Catalog()
    for name in ("acme/tweet_adapter", "tweet_adapters"):
        catalog.learn(_version(name, 1))
    assert catalog.near("tweet_adaptor") == "tweet_adapters"
    assert catalog.near("tweet_adaptor", tenant="acme") == "tweet_adapter"
    assert catalog.near("tweet_adaptor", tenant="umbrella") == ""
    assert catalog.near("tweet_adaptor", tenant="acme", included=lambda name: name != "acme/tweet_adapter") == ""


def test_names_of_other_tenants_do_not_stand_between_near_ones() -> None:
    catalog = Catalog()
    _list(catalog, _version("acme0", 1), *(_version(f"acme/{number:04}", 1) for number in range(1_000)))
    assert catalog.near("acme-") == "acme0"
