"""The registry from Python, against a real one over a real store."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from softprompt.cli import main
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore
from softprompt.errors import InvalidArgument
from softprompt.registry import RegistryClient
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings

BASES = ("org/One", "org/Two")


@pytest.fixture(scope="module")
def folder(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(60, 4).resolve()


@pytest.fixture
async def address(tmp_path: Path, folder: Path) -> AsyncIterator[str]:
    """A registry that knows two base models of one shape, and may import the folder."""
    store = EmbeddedStore(tmp_path, tmp_path / "logs", Stop())
    process = store.start()
    settings = Settings(address="127.0.0.1:0", redis_url=store.url, grace_s=0, allow_file_imports=folder.parent)
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


async def test_an_adapter_is_for_the_base_model_that_is_named(address: str, folder: Path) -> None:
    def live() -> None:
        with RegistryClient(address) as client:
            with pytest.raises(InvalidArgument, match="several base models are known"):
                client.add("tweets", folder)
            assert client.add("tweets", folder, base_model="org/Two")[0].base_model == "org/Two"
            source = folder.as_uri()
            assert client.import_from("sms", source, base_model="org/One")[0].base_model == "org/One"

    await asyncio.to_thread(live)


async def test_a_content_is_ensured_for_each_base_model(address: str, folder: Path) -> None:
    def live() -> None:
        with RegistryClient(address) as client:
            ensured = [
                client.ensure("tweets", folder, base_model=base) for base in ("org/One", "org/One", "org/Two")
            ]
            assert [(info.version, is_new) for info, is_new in ensured] == [(1, True), (1, False), (2, True)]
            assert client.ensure("tweets", folder)[1] is False

    await asyncio.to_thread(live)


async def test_the_command_line_names_a_base_model(
    address: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(*flags: str) -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main(("adapter", "add", "tweets", str(folder), "--no-probe", "--json", "--registry", address, *flags))
        return ended.value.code

    assert await asyncio.to_thread(add) == 1
    assert "choose one of org/One, org/Two" in capsys.readouterr().err
    assert await asyncio.to_thread(add, "--base-model", "org/Two") == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{\n") :])["base_model"] == "org/Two"
