"""API keys over gRPC, with a real store."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from softprompt_api.access import key_sha256
from softprompt_api.errors import DataCorrupted, InvalidArgument, KeyNotFound, Overloaded, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import KeyServiceStub
from softprompt_registry.server import RegistryServer

INFER, ADMIN = pb.KEY_SCOPE_INFER, pb.KEY_SCOPE_ADMIN


class Keys:
    """The keys' client in tests."""

    def __init__(self, client) -> None:
        self._client = client
        self._stub = KeyServiceStub(client.channel)

    async def create(self, *scopes, **fields) -> pb.CreateKeyResponse:
        request = pb.CreateKeyRequest(scopes=scopes or [INFER], **fields)
        return await self._client.answer(self._stub.CreateKey(request, timeout=20))

    async def get(self, sha256: str) -> pb.ApiKey:
        answer = await self._client.answer(self._stub.GetKey(pb.GetKeyRequest(sha256=sha256), timeout=20))
        return answer.api_key

    async def page(self, **query) -> pb.ListKeysResponse:
        return await self._client.answer(self._stub.ListKeys(pb.ListKeysRequest(**query), timeout=20))

    async def ids(self) -> list[str]:
        return [key.id for key in (await self.page()).api_keys]

    async def revoke(self, id_: str) -> None:
        await self._client.answer(self._stub.RevokeKey(pb.RevokeKeyRequest(id=id_), timeout=20))


@pytest.fixture
def keys(bare_client) -> Keys:
    return Keys(bare_client)


async def test_a_key_is_found_by_its_sha256_alone(keys):
    expires_at = datetime.now(UTC) + timedelta(days=1)
    request = pb.CreateKeyRequest(
        tenant="acme",
        name="the shop's",
        adapters=["tweets"],
        limits=pb.KeyLimits(requests_per_minute=5, tokens_per_minute=6, parallel_requests=7),
    )
    request.expires_at.FromDatetime(expires_at)
    fields = {field.name: value for field, value in request.ListFields()}
    made = await keys.create(INFER, ADMIN, **fields)
    assert made.key.startswith("sk-sp-")
    key = await keys.get(key_sha256(made.key))
    assert key == made.api_key
    assert (key.tenant, list(key.scopes), list(key.adapters)) == ("acme", [INFER, ADMIN], ["tweets"])
    assert (key.limits, key.name) == (request.limits, "the shop's")
    assert key.expires_at.ToDatetime(tzinfo=UTC) == expires_at


async def test_a_key_of_nobody_is_the_default_tenants(keys):
    made = await keys.create()
    assert (made.api_key.tenant, made.api_key.HasField("expires_at")) == ("default", False)


async def test_two_keys_are_never_alike(keys):
    made = [await keys.create() for _ in range(3)]
    assert len({one.key for one in made}) == len({one.api_key.id for one in made}) == 3
    assert all(len(one.key) >= 40 for one in made)


async def test_a_keys_text_is_neither_in_the_store_nor_in_the_log(keys, redis):
    with structlog.testing.capture_logs() as logged:
        made = await keys.create(ADMIN)
        await keys.revoke(made.api_key.id)
        made = await keys.create(ADMIN)
    secret = made.key.removeprefix("sk-sp-").encode()
    for name in await redis.keys("*"):
        assert secret not in name
        dumped = await redis.dump(name)
        assert secret not in dumped
    assert secret.decode() not in repr(logged)
    lines = [line for line in logged if line["event"] == "audit"]
    assert [(line["action"], line["outcome"]) for line in lines] == [
        ("key.create", "done"),
        ("key.revoke", "done"),
        ("key.create", "done"),
    ]
    assert lines[2]["created"] == made.api_key.id
    assert lines[2]["scopes"] == ["admin"]
    assert "peer" in lines[2]


async def test_a_revoked_key_is_gone(keys):
    made = await keys.create()
    await keys.revoke(made.api_key.id)
    with pytest.raises(KeyNotFound):
        await keys.get(made.api_key.sha256)
    with pytest.raises(KeyNotFound, match=made.api_key.id):
        await keys.revoke(made.api_key.id)
    assert await keys.ids() == []


async def test_a_key_is_revoked_in_a_full_store_too(keys, redis):
    made = await keys.create()
    await redis.config_set("maxmemory", "1")
    with pytest.raises(Overloaded):
        await keys.create()
    await keys.revoke(made.api_key.id)
    await redis.config_set("maxmemory", "0")
    assert await keys.ids() == []


async def test_that_a_key_was_made_is_not_forgotten(keys):
    assert not (await keys.page()).ever_made
    made = await keys.create()
    await keys.revoke(made.api_key.id)
    assert (await keys.page()).ever_made


async def test_keys_are_listed_in_pages_in_order_of_ids(keys):
    ids = sorted([(await keys.create()).api_key.id for _ in range(5)])
    assert await keys.ids() == ids
    listed, token = [], ""
    while True:
        page = await keys.page(page_size=2, page_token=token)
        listed += [key.id for key in page.api_keys]
        token = page.next_page_token
        if not token:
            break
        assert len(page.api_keys) == 2
    assert listed == ids
    with pytest.raises(InvalidArgument):
        await keys.page(page_token="x")


async def test_a_page_of_keys_never_outgrows_a_message(keys):
    adapters = [f"{number:03}" + 125 * "a" for number in range(256)]
    ids = sorted([(await keys.create(adapters=adapters)).api_key.id for _ in range(130)])
    listed, token = [], ""
    while True:
        page = await keys.page(page_size=1000, page_token=token)
        assert page.ByteSize() < 3 * 2**20
        listed += [key.id for key in page.api_keys]
        token = page.next_page_token
        if not token:
            break
    assert listed == ids


async def test_what_no_key_can_be_is_refused(keys):
    for fields, field in (
        ({"scopes": [0]}, "scopes"),
        ({"scopes": [99]}, "scopes"),
        ({"tenant": "A"}, "tenant"),
        ({"limits": pb.KeyLimits(parallel_requests=-1)}, "limits.parallel_requests"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await keys.create(*fields.pop("scopes", [INFER]), **fields)
        assert refused.value.field == field
    with pytest.raises(InvalidArgument):
        await keys.get("x")
    with pytest.raises(InvalidArgument):
        await keys.revoke("x")
    assert not (await keys.page()).ever_made


async def test_a_damaged_record_takes_no_other_along_and_can_be_revoked(keys, redis):
    damaged, other = await keys.create(), await keys.create(ADMIN)
    await redis.hset(f"sp:k:{damaged.api_key.sha256}", "record", "{}")
    with pytest.raises(DataCorrupted):
        await keys.get(damaged.api_key.sha256)
    assert await keys.ids() == [other.api_key.id]
    await keys.revoke(damaged.api_key.id)
    with pytest.raises(KeyNotFound):
        await keys.get(damaged.api_key.sha256)


async def test_an_acknowledged_key_survives_the_death_of_the_store(keys, valkey, settings, connect):
    made, gone = await keys.create(ADMIN), await keys.create()
    await keys.revoke(gone.api_key.id)
    valkey.kill()
    with pytest.raises(Unavailable):
        await keys.get(made.api_key.sha256)
    valkey.start()
    async with RegistryServer(settings) as server:
        client = connect(server.port)
        again = Keys(client)
        assert await again.get(made.api_key.sha256) == made.api_key
        assert await again.ids() == [made.api_key.id]
        await client.channel.close()


async def test_watchers_are_told_of_keys_at_once(keys, bare_client):
    call = bare_client.stub.WatchAdapters(pb.WatchAdaptersRequest())
    await call.read()
    made = await keys.create(tenant="acme")
    async with asyncio.timeout(1):
        created = await _next(call)
    await keys.revoke(made.api_key.id)
    async with asyncio.timeout(1):
        revoked = await _next(call)
    call.cancel()
    assert (created.type, created.key) == (pb.ADAPTER_EVENT_TYPE_KEY_CREATED, made.api_key)
    assert not created.HasField("adapter")
    assert revoked.type == pb.ADAPTER_EVENT_TYPE_KEY_REVOKED
    assert revoked.key == pb.ApiKey(id=made.api_key.id, sha256=made.api_key.sha256)


async def test_a_watcher_that_was_away_is_told_what_became_of_keys(keys, bare_client):
    await keys.create()
    call = bare_client.stub.WatchAdapters(pb.WatchAdaptersRequest())
    cursor = (await call.read()).cursor
    call.cancel()
    gone, made = await keys.create(), await keys.create()
    await keys.revoke(gone.api_key.id)
    call = bare_client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=cursor))
    events = [await _next(call) for _ in range(2)]
    call.cancel()
    assert [(event.type, event.key.id) for event in events] == [
        (pb.ADAPTER_EVENT_TYPE_KEY_CREATED, made.api_key.id),  # the other one is no more
        (pb.ADAPTER_EVENT_TYPE_KEY_REVOKED, gone.api_key.id),
    ]


async def _next(call) -> pb.WatchAdaptersResponse:
    """The next event that is no heartbeat."""
    while (response := await call.read()).type == pb.ADAPTER_EVENT_TYPE_HEARTBEAT:
        pass
    return response
