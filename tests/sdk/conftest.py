"""A real registry over a real store, and an adapter for it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings

BASES = ("org/One", "org/Two")


@pytest.fixture(scope="module")
def folder(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(60, 4).resolve()


@pytest.fixture
async def address(tmp_path: Path, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A registry that knows two bases of one shape, and may import the folder; the parameter: durability."""
    store = EmbeddedStore(tmp_path, tmp_path / "logs", Stop())
    process = store.start()
    settings = Settings(
        address="127.0.0.1:0",
        redis_url=store.url,
        grace_s=0,
        allow_file_imports=folder.parent,
        durability=getattr(request, "param", "strong"),
    )
    try:
        async with (
            RegistryServer(settings) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            for base in BASES:
                model = pb.BaseModel(id=base, hidden_size=64)
                await RegistryServiceStub(channel).PutBaseModel(pb.PutBaseModelRequest(base_model=model))
            yield f"127.0.0.1:{server.port}"
    finally:
        process.end(10)
