"""Commands and clients reach services with TLS, where they are told whom to believe."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from softprompt.cli import main
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore
from softprompt.errors import Unavailable
from softprompt.inference import InferenceClient
from softprompt.registry import RegistryClient
from softprompt_api.rpc.tls import ClientTls
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import read_settings


@pytest.fixture
async def address(tmp_path: Path, authority: Any) -> AsyncIterator[str]:
    """A registry that asks whoever calls for a certificate."""
    store = EmbeddedStore(tmp_path, tmp_path / "logs", Stop())
    process = store.start()
    cert, key = authority.issue()
    files = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.cert))
    settings = read_settings(["--address", "127.0.0.1:0", "--redis-url", store.url, "--grace-s", "0", *files])
    try:
        # What it logs is not what commands print.
        with structlog.testing.capture_logs():
            async with RegistryServer(settings) as server:
                yield f"127.0.0.1:{server.port}"
    finally:
        process.end(10)


async def run(*arguments: str) -> int:
    """Run `softprompt …` in a thread, whose choices are its own; its exit code."""

    def live() -> int:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return await asyncio.to_thread(live)


async def test_flags_or_variables_say_whom_to_believe_and_what_to_show(
    address: str, authority: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = map(str, authority.issue())
    flags = ("--tls-ca", str(authority.cert), "--tls-client-cert", cert, "--tls-client-key", key)
    assert await run(*flags, "key", "create", "--json", "--registry", address) == 0
    made = json.loads(capsys.readouterr().out)
    assert await run("key", "ls", "--registry", address) == 1
    assert "no registry answers" in capsys.readouterr().err
    for name, path in {"CA": str(authority.cert), "CLIENT_CERT": cert, "CLIENT_KEY": key}.items():
        monkeypatch.setenv(f"SOFTPROMPT_TLS_{name}", path)
    assert await run("key", "ls", "--json", "--registry", address) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == [made["id"]]


async def test_clients_in_python_take_certificates(address: str, authority: Any, strange_authority: Any) -> None:
    cert, key = authority.issue()

    def names(tls: ClientTls | None) -> list[str]:
        with RegistryClient(address, tls=tls) as client:
            return [info.name for info in client.adapters()]

    assert await asyncio.to_thread(names, ClientTls(ca=authority.cert, cert=cert, key=key)) == []
    strange = ClientTls(ca=strange_authority.cert, cert=cert, key=key)
    with pytest.raises(Unavailable, match=f"with a certificate of an authority in {strange.ca}"):
        await asyncio.to_thread(names, strange)
    for tls in (None, ClientTls(ca=authority.cert)):
        with pytest.raises(Unavailable, match="no registry answers"):
            await asyncio.to_thread(names, tls)


def test_the_inference_service_is_called_in_the_same_way(authority: Any) -> None:
    with (
        InferenceClient("127.0.0.1:1", tls=ClientTls(ca=authority.cert)) as client,
        pytest.raises(Unavailable, match=r"no inference service answers at 127.0.0.1:1 with a certificate"),
    ):
        client.resident()
