"""The store dies, hangs, comes back: what was acknowledged stays, and nothing else breaks."""

import asyncio
import contextlib
import itertools
import os
import time
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.errors import AdapterNotFound, SoftpromptError, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry.catalog import BaseModel
from softprompt_registry.connection import open_store
from softprompt_registry.leases import Leases
from softprompt_registry.server import RegistryServer
from softprompt_registry.store import Store


@pytest.fixture
def is_serving(client):
    """Whether the registry's health says SERVING."""
    stub = health_pb2_grpc.HealthStub(client.channel)

    async def ask() -> bool:
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    return ask


async def test_what_was_acknowledged_survives_kill_9_of_the_store(
    client, make_adapter, valkey, eventually, content
):
    acknowledged, refused, is_over = [], 0, False

    async def keep_registering(writer: int) -> None:
        nonlocal refused
        for number in itertools.count():
            if is_over:
                return
            adapter = make_adapter(writer * 1_000_000 + number)
            try:
                acknowledged.append((await client.register(f"a{writer}", adapter), adapter.tensors))
            except Unavailable:
                refused += 1

    writing = [asyncio.create_task(keep_registering(writer)) for writer in range(3)]
    for _ in range(3):

        async def has_progress(count: int = len(acknowledged) + 15) -> bool:
            return len(acknowledged) >= count or any(task.done() for task in writing)

        await eventually(has_progress)
        await asyncio.to_thread(valkey.kill)
        await asyncio.to_thread(valkey.start)
    is_over = True
    await asyncio.gather(*writing)
    assert len(acknowledged) >= 45
    assert refused, "no kill hit a registration; the test proves nothing"
    for version, tensors in acknowledged:
        assert content(await client.get(f"{version.name}@{version.version}")) == content(version)
        assert await client.read(version.digest) == tensors
    assert len({version.id for version, _ in acknowledged}) == len(acknowledged)


async def test_a_dead_store_is_unavailable_at_once_and_comes_back_by_itself(
    client, make_adapter, valkey, eventually, is_serving
):
    made = await client.register("tweets", make_adapter())
    assert await is_serving()
    valkey.kill()
    for call in (client.get("tweets"), client.register("other", make_adapter()), client.delete("tweets")):
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await call
        assert time.monotonic() - started < 2

    async def is_away() -> bool:
        return not await is_serving()

    await eventually(is_away)
    valkey.start()
    await eventually(is_serving)
    assert await client.get("tweets") == made


async def test_a_silent_store_is_unavailable_within_its_timeout(
    client, make_adapter, valkey, eventually, is_serving
):
    made = await client.register("tweets", make_adapter())
    valkey.pause()
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await client.register("other", make_adapter())
    assert time.monotonic() - started < 3
    valkey.resume()
    await eventually(is_serving)
    assert await client.get("tweets") == made


class ForgetfulLink:
    """A link to a store that ends, once, when the store says that a change was made, and does not pass it on.

    Attributes:
        forgets: whether the next change is the one.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_suffix(".link")
        self.url = f"unix://{self._path}"
        self.forgets = False

    async def __aenter__(self) -> "ForgetfulLink":
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        self._path.unlink(missing_ok=True)  # from Python 3.13 on the server does it

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        down = asyncio.create_task(self._copy(up_reader, writer))
        if await self._copy(reader, up_writer):
            down.cancel()
            await asyncio.wait([down])
            await up_reader.readuntil(b"*")  # replies to what was queued have none
        down.cancel()
        for end in (writer, up_writer):
            end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether it ended behind a change that is to be forgotten."""
        sent = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                sent += data
                if sent.endswith(b"EXEC\r\n"):
                    if self.forgets and b"XADD" in sent:
                        self.forgets = False
                        return True
                    sent = b""
        return False


@pytest.fixture
async def link(valkey):
    async with ForgetfulLink(valkey.socket) as link:
        yield link


@pytest.fixture
async def linked(client, link, settings, connect, make_adapter):
    """A client of a registry behind the link, where "tweets" has two versions and "prod" is the first."""
    async with RegistryServer(settings.model_copy(update={"redis_url": link.url})) as server:
        linked = connect(server.port)
        for seed in range(2):
            await linked.register("tweets", make_adapter(seed))
        await linked.set_alias("tweets", "prod", 1)
        yield linked
        await linked.channel.close()


@pytest.mark.parametrize("header", [{}, {"idempotency_key": "k"}])
async def test_a_registration_whose_acknowledgement_is_lost_is_made_once(
    linked, link, make_adapter, redis, header
):
    adapter = make_adapter(5).but(header=header)
    num_events = await redis.xlen("sp:events")
    link.forgets = True
    made = await linked.register("sms", adapter)
    assert not link.forgets
    assert await linked.get("sms") == made
    assert await linked.versions("sms") == [1]
    assert await redis.xlen("sp:events") == num_events + 1
    assert await redis.hget(f"sp:{{blob:{adapter.sha256}}}:m", "num_versions") == b"1"


async def test_a_registration_that_may_still_be_on_its_way_is_not_called_unmade(
    linked, link, make_adapter, monkeypatch
):
    link.forgets = True
    with monkeypatch.context() as before_it_came:
        before_it_came.setattr(Store, "find_id", AsyncMock(return_value=None))
        with pytest.raises(Unavailable, match="may have been registered; ask for it"):
            await linked.register("sms", make_adapter(5))
    assert (await linked.get("sms")).version == 1


async def test_a_change_before_which_somebody_may_still_answer_from_is_told_as_made(
    client, make_adapter, monkeypatch
):
    with monkeypatch.context() as away:
        away.setattr(Leases, "settle", AsyncMock(side_effect=Unavailable("the store is away; try again")))
        with pytest.raises(Unavailable, match="the change was made"):
            await client.register("tweets", make_adapter())
    assert (await client.get("tweets")).version == 1


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda client: client.delete("tweets", 2), "tweets@2"),
        (lambda client: client.set_alias("tweets", "prod", 0), "tweets@prod"),
        (lambda client: client.delete("sms"), "sms"),
    ],
    ids=["version", "alias", "name"],
)
async def test_a_removal_whose_acknowledgement_is_lost_is_done_once_and_not_called_missing(
    linked, link, make_adapter, redis, change, missing
):
    await linked.register("sms", make_adapter(5))
    num_events = await redis.xlen("sp:events")
    link.forgets = True
    with pytest.raises(Unavailable):
        await change(linked)
    with pytest.raises(AdapterNotFound):
        await linked.get(missing)
    assert await redis.xlen("sp:events") == num_events + 1


async def test_an_alias_whose_acknowledgement_is_lost_is_set_once(linked, link, redis):
    num_events = await redis.xlen("sp:events")
    link.forgets = True
    with pytest.raises(Unavailable):
        await linked.set_alias("tweets", "prod", 2, expected=1)
    assert (await linked.get("tweets@prod")).version == 2
    assert await redis.xlen("sp:events") == num_events + 1


async def test_a_full_store_refuses_and_keeps_what_it_has(client, make_adapter, redis):
    made = await client.register("tweets", make_adapter())
    await redis.config_set("maxmemory", "1")
    with pytest.raises(SoftpromptError) as refused:
        await client.register("more", make_adapter(num_virtual_tokens=20_000))
    assert refused.value.reason == "OVERLOADED"
    assert await client.get("tweets") == made
    await redis.config_set("maxmemory", "0")
    await client.register("more", make_adapter(num_virtual_tokens=20_000))


async def test_a_base_model_can_be_served_beside_a_full_store(bare_client, redis):
    """An inference service announces its model before it serves, also after a restart."""
    model = pb.BaseModel(id="org/Tiny", hidden_size=32)
    await redis.config_set("maxmemory", "1")
    for _ in range(2):
        await bare_client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=model))
    listed = await bare_client.stub.ListBaseModels(pb.ListBaseModelsRequest())
    assert [model.id for model in listed.base_models] == [model.id]
    await redis.config_set("maxmemory", "0")


async def test_a_full_store_can_be_emptied_and_its_aliases_moved(client, make_adapter, redis):
    for seed in (0, 1, 1):
        await client.register("tweets", make_adapter(seed))
    await client.update("tweets@2", "pinned", pinned=True)
    await redis.config_set("maxmemory", "1")
    await client.set_alias("tweets", "latest", 1)
    await client.set_alias("tweets", "stable", 1)
    await client.update("tweets@2", "pinned", pinned=False)
    await client.delete("tweets", 2)
    assert await client.versions("tweets") == [3, 1]
    assert await client.read((await client.get("tweets@3")).digest) == make_adapter(1).tensors
    await client.delete("tweets")
    assert await client.names() == []
    await redis.config_set("maxmemory", "0")


async def test_a_cancelled_command_never_leaves_its_answer_to_the_next_caller(valkey):
    client = open_store(valkey.url, timeout_s=2, max_connections=2)
    store = Store(client)
    for number in range(20):
        model = BaseModel(
            id=f"m{number}", architecture="", hidden_size=number + 1, num_layers=0, num_kv_heads=0, head_dim=0,
            vocab_size=0, tokenizer_sha256="", max_virtual_tokens=0, dtype="",
        )  # fmt: skip
        await store.put_base_model(model)
    for number in range(200):
        reading = asyncio.create_task(store.count_names())
        for _ in range(number % 7):
            await asyncio.sleep(0)
        reading.cancel()
        models = await store.base_models()
        assert len(models) == 20
        assert await store.latest_number("nobody") is None
    await client.aclose()
    await client.connection_pool.disconnect()


async def test_stopping_lets_running_calls_end(settings, connect, make_adapter, client):
    async with asyncio.timeout(20):
        server = RegistryServer(settings)
        await server.start()
        uploader = connect(server.port)
        header, *chunks = make_adapter(num_virtual_tokens=20_000).requests("late")
        upload = uploader.stub.RegisterAdapter()
        await upload.write(header)
        await upload.write(chunks[0])
        stopping = asyncio.create_task(server.stop())
        for chunk in chunks[1:]:
            await upload.write(chunk)
        await upload.done_writing()
        assert (await upload).adapter.name == "late"
        await stopping
        with pytest.raises(Unavailable):
            await uploader.get("late")
        await uploader.channel.close()
    assert (await client.get("late")).version == 1


async def test_errors_tell_no_paths_and_no_keys(client, valkey):
    valkey.kill()
    with pytest.raises(Unavailable) as refused:
        await client.get("tweets")
    assert str(valkey.socket) not in refused.value.message
    assert "sp:" not in refused.value.message
    assert os.sep not in refused.value.message
