"""What was acknowledged survives kill -9 of every process, the store's too, at any moment and on any disk."""

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import httpx
import pytest
from softprompt_api.errors import AdapterNotFound, SoftpromptError, Unavailable
from softprompt_api.registry.v1 import registry_pb2 as pb

T = TypeVar("T")

pytestmark = pytest.mark.timeout(1800)
_PAUSE_S = 0.02
# Nothing is away for so long.
_AWAY_S = 120.0
_ALIASES = ("latest", "prod", "beta")


class Writer:
    """One client that changes one name, asks again until each change is acknowledged, and remembers what was."""

    def __init__(self, number: int, client: Any, adapter: Callable[..., Any], rng: random.Random) -> None:
        self.name = f"writer{number}"
        self._client = client
        self._adapter = adapter
        self._rng = rng
        self._seeds = iter(range(1_000_000 * number, 1_000_000 * (number + 1)))
        self.versions: dict[int, Any] = {}  # number → (what was answered, the adapter)
        self._keys: dict[int, str] = {}  # number → the idempotency key that it was made with
        self.aliases: dict[str, int] = {}
        self.num_acknowledged = 0
        self.num_repeated = 0
        self.lost: list[str] = []

    async def run(self, stop: asyncio.Event, turns: "asyncio.Queue[str]") -> None:
        """Write until told to stop, or until something is not there that must be; tell of every turn."""
        while not stop.is_set() and not self.lost:
            try:
                await self._write()
                self.num_acknowledged += 1
            except SoftpromptError as error:
                self.lost.append(f"{self.name}: {error.message}")
            turns.put_nowait(self.name)

    async def _write(self) -> None:
        free = [number for number in self.versions if number not in self.aliases.values()]
        kind = self._rng.choices(["register", "alias", "remove", "delete"], [6, 2, 1, 2])[0]
        if kind == "delete" and len(free) > 2:
            await self._delete(self._rng.choice(free))
        elif kind == "alias" and self.versions:
            alias, number = self._rng.choice(_ALIASES), self._rng.choice(sorted(self.versions))
            await self._acknowledged(lambda: self._client.set_alias(self.name, alias, number))
            self.aliases[alias] = number
        elif kind == "remove" and "prod" in self.aliases:
            await self._gone(lambda: self._client.set_alias(self.name, "prod", 0))
            del self.aliases["prod"]
        else:
            await self._register()

    async def _register(self) -> None:
        seed = next(self._seeds)
        made_of = self._adapter(seed, num_virtual_tokens=1 + seed % 7)
        key = f"{self.name}-{seed}"
        made = await self._acknowledged(lambda: self._client.register(self.name, made_of, idempotency_key=key))
        if made.version in self.versions:
            self.lost.append(f"{self.name}@{made.version} was given twice")
        self.versions[made.version] = (made, made_of)
        self._keys[made.version] = key
        self.aliases["latest"] = made.version

    async def _delete(self, number: int) -> None:
        await self._gone(lambda: self._client.delete(self.name, number))
        del self.versions[number]

    async def _acknowledged(self, call: Callable[[], Awaitable[T]]) -> T:
        until_s = time.monotonic() + _AWAY_S
        while True:
            try:
                return await call()
            except Unavailable:
                if time.monotonic() > until_s:
                    raise
                self.num_repeated += 1
                await asyncio.sleep(_PAUSE_S)

    async def _gone(self, call: Callable[[], Awaitable[None]]) -> None:
        """As `_acknowledged`, for what is not there the second time."""
        before = self.num_repeated
        try:
            await self._acknowledged(call)
        except AdapterNotFound:
            if self.num_repeated == before:
                raise

    async def verify(self, client: Any) -> list[str]:
        """What is not as it was acknowledged."""
        try:
            found = await client.versions(self.name)
        except AdapterNotFound:
            found = {}
        wrong = list(self.lost)
        wrong += [f"{self.name}@{number} is lost" for number in sorted(self.versions.keys() - found.keys())]
        wrong += [f"{self.name}@{number} was not acknowledged" for number in sorted(found.keys() - self.versions)]
        for number in self.versions.keys() & found.keys():
            made, made_of = self.versions[number]
            for field in self._client.tells:
                if getattr(found[number], field) != getattr(made, field):
                    wrong.append(f"{self.name}@{number} has another {field}")
            if await client.read(made.digest) != made_of.tensors:
                wrong.append(f"{self.name}@{number} has other tensors")
        aliases = {alias: number for number, version in found.items() for alias in version.aliases}
        if aliases != self.aliases:
            wrong.append(f"{self.name} has the aliases {aliases}, not {self.aliases}")
        return wrong

    async def verify_keys(self, client: Any, *, each: int) -> list[str]:
        """What its last idempotency keys, so many, do again that they did before."""
        wrong = []
        before = await self._content(client)
        for number, (made, made_of) in islice(reversed(self.versions.items()), each):
            again = await self._client.register(self.name, made_of, idempotency_key=self._keys[number])
            if (again.version, again.digest) != (number, made.digest):
                wrong.append(f"{self.name}@{number} was made again as {again.version}")
        if await self._content(client) != before:
            wrong.append(f"{self.name} was changed by keys that were used before")
        return wrong

    async def _content(self, client: Any) -> dict[int, tuple[str, list[str]]]:
        """Digests and aliases of the versions: what else is told of them changes when they have been probed."""
        return {
            number: (version.digest, list(version.aliases))
            for number, version in (await client.versions(self.name)).items()
        }


async def write_and_kill(
    writers: list[Writer],
    victims: list[Any],
    store: Any,
    rng: random.Random,
    *,
    kills: int,
    acks_between: tuple[int, int],
    sync_s: float = 0.0,
    is_time: Callable[[], Awaitable[bool]] | None = None,
) -> None:
    """Kill a victim at a random moment, so many times, while writers write over a disk that is `sync_s` slow.

    With `is_time`, which is asked after each further acknowledgement, only at a moment that it finds right.
    """
    stop, turns = asyncio.Event(), asyncio.Queue()
    order: list[Any] = []  # of the next victims: each dies as often as any other
    async with asyncio.TaskGroup() as group:
        for writer in writers:
            group.create_task(writer.run(stop, turns))
        for _ in range(kills):
            store.sync_takes(sync_s)
            async with asyncio.timeout(_AWAY_S):
                for _ in range(rng.randint(*acks_between)):
                    if all(writer.lost for writer in writers):
                        break
                    await turns.get()
            # Anywhere between two acknowledgements.
            await asyncio.sleep(rng.uniform(0, _PAUSE_S))
            async with asyncio.timeout(_AWAY_S):
                while is_time is not None and not await is_time():
                    await turns.get()
            order = order or rng.sample(victims, len(victims))
            victim = order.pop()
            victim.kill()
            store.sync_takes(0)
            await asyncio.to_thread(victim.start)
        stop.set()


async def verify(writers: list[Writer], client: Any, look: Any) -> list[str]:
    """What is not as it was acknowledged, or is there and should not be."""
    wrong = [problem for writer in writers for problem in await writer.verify(client)]
    listed = {version.name: version.version for version in await client.latest()}
    for writer in writers:
        latest = writer.aliases["latest"] if writer.versions else None
        if listed.get(writer.name) != latest:
            wrong.append(f"{writer.name} is listed with {listed.get(writer.name)}, not with {latest}")
    users: dict[bytes, int] = {}
    for key in await look.keys("sp:{v:*"):
        sha256 = await look.hget(key, "tensors_sha256")
        users[sha256] = users.get(sha256, 0) + 1
    counted = {}
    for key in await look.keys("sp:{blob:*:m"):
        counted[await look.hget(key, "sha256")] = int(await look.hget(key, "num_versions"))
    if counted != users:
        wrong.append("blobs are not those of the versions")
    staged = await look.keys("*:u:*")
    if not all([await look.ttl(key) > 0 for key in staged]):
        wrong.append("what uploads left does not expire")
    return wrong


@pytest.mark.parametrize(
    ("kills", "sync_s"),
    [
        (8, 0.0),
        (4, 0.01),
        pytest.param(200, 0.0, marks=pytest.mark.chaos),
        pytest.param(200, 0.05, marks=pytest.mark.chaos),
    ],
)
async def test_what_was_acknowledged_survives_kill_9(
    make_store: Any, make_registry: Any, connect: Any, look_into: Any, adapter: Any, kills: int, sync_s: float
) -> None:
    rng = random.Random(f"{kills} {sync_s}")
    store = make_store()
    registry = make_registry(store)
    client = connect(registry.address)
    await client.put_base_model()
    writers = [Writer(number, client, adapter, random.Random(rng.random())) for number in range(3)]
    await write_and_kill(writers, [store, registry], store, rng, kills=kills, acks_between=(1, 12), sync_s=sync_s)
    assert await verify(writers, client, look_into(store)) == []
    assert [problem for writer in writers for problem in await writer.verify_keys(client, each=20)] == []
    assert sum(writer.num_acknowledged for writer in writers) >= kills
    assert sum(writer.num_repeated for writer in writers), "no kill hit a change; the test proves nothing"


class HttpClient:
    """The changes that writers make, over HTTP; a gateway that is away is Unavailable, as all that is away."""

    tells = ("id", "digest", "tensors_sha256", "config_json")

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def register(self, name: str, adapter: Any, *, idempotency_key: str) -> pb.AdapterVersion:
        headers = {
            "content-type": "application/octet-stream",
            "x-adapter-config": base64.b64encode(adapter.config_json.encode()).decode(),
            "x-adapter-sha256": hashlib.sha256(adapter.tensors).hexdigest(),
            "idempotency-key": idempotency_key,
        }
        made = await self._ask("POST", f"/v1/adapters/{name}", content=adapter.tensors, headers=headers)
        return pb.AdapterVersion(
            name=made["name"],
            version=made["version"],
            id=made["id"],
            digest=made["digest"],
            tensors_sha256=made["sha256"],
            config_json=adapter.config_json,
        )

    async def set_alias(self, name: str, alias: str, version: int) -> None:
        path = f"/v1/adapters/{name}/aliases/{alias}"
        await (self._ask("PUT", path, json={"version": version}) if version else self._ask("DELETE", path))

    async def delete(self, name: str, version: int) -> None:
        await self._ask("DELETE", f"/v1/adapters/{name}@{version}")

    async def use(self, model: str) -> httpx.Response:
        """One token from an adapter."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        return await self._http.post("/v1/completions", json=body)

    async def _ask(self, method: str, path: str, **content: Any) -> Any:
        try:
            response = await self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise Unavailable("the gateway is away") from error
        if response.status_code in (503, 504):
            raise Unavailable(response.text)
        if response.status_code == 404:
            raise AdapterNotFound(response.text)
        if response.is_error:
            raise SoftpromptError(f"{method} {path}: {response.status_code} {response.text}")
        return response.json()


async def unusable(writers: list[Writer], client: HttpClient, *, each: int) -> list[str]:
    """Acknowledged versions that cannot be used over HTTP, among so many of each writer's last."""
    wrong = []
    for writer in writers:
        for number, (made, _) in islice(reversed(writer.versions.items()), each):
            answer = await client.use(f"{writer.name}@{number}")
            used = answer.headers.get("x-softprompt-adapter"), answer.headers.get("x-softprompt-adapter-digest")
            if answer.status_code != 200 or used != (f"{writer.name}@{number}", made.digest):
                wrong.append(f"{writer.name}@{number} answers {answer.status_code} {used} {answer.text[:200]}")
    return wrong


@pytest.mark.parametrize(("kills", "used"), [(4, 10), pytest.param(200, 300, marks=pytest.mark.chaos)])
async def test_what_was_acknowledged_survives_the_death_of_every_process_and_is_used_over_http(
    make_store: Any,
    make_registry: Any,
    make_inference: Any,
    make_gateway: Any,
    connect: Any,
    look_into: Any,
    adapter: Any,
    kills: int,
    used: int,
) -> None:
    rng = random.Random(kills)
    store = make_store()
    registry = make_registry(store)
    inference = make_inference(registry)
    gateway = make_gateway(registry, inference)
    client = connect(registry.address)
    fitting = partial(adapter, hidden_size=64)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
        over_http = HttpClient(http)
        writers = [
            Writer(number, over_http if number else client, fitting, random.Random(rng.random()))
            for number in range(3)
        ]
        victims = [store, registry, inference, gateway]
        await write_and_kill(writers, victims, store, rng, kills=kills, acks_between=(1, 12))
        assert await verify(writers, client, look_into(store)) == []
        assert [problem for writer in writers for problem in await writer.verify_keys(client, each=20)] == []
        assert await unusable(writers, over_http, each=used) == []
    assert sum(writer.num_acknowledged for writer in writers) >= kills
    assert sum(writer.num_repeated for writer in writers), "no kill hit a change; the test proves nothing"


async def test_a_store_that_does_not_sync_every_write_loses_acknowledged_ones_and_is_found_out(
    make_store: Any, make_registry: Any, connect: Any, look_into: Any, adapter: Any
) -> None:
    # The proof that the test above can fail: the same writers, the same check, a store that syncs once a second.
    rng = random.Random(1)
    store = make_store("everysec")
    registry = make_registry(store, durability="weak")
    client = connect(registry.address)
    await client.put_base_model()
    for trial in range(5):
        writers = [Writer(3 * trial + number, client, adapter, random.Random(number)) for number in range(3)]
        look = look_into(store)

        async def has_acknowledged_what_it_has_not_written(look: Any = look) -> bool:
            told = await look.info("persistence")
            return bool(told["aof_pending_bio_fsync"] and told["aof_buffer_length"])

        await write_and_kill(
            writers,
            [store],
            store,
            rng,
            kills=1,
            acks_between=(150, 300),
            sync_s=3.0,
            is_time=has_acknowledged_what_it_has_not_written,
        )
        wrong = await verify(writers, client, look_into(store))
        if any("is lost" in problem for problem in wrong):
            return
    pytest.fail("nothing was lost: this test would not notice a loss")
