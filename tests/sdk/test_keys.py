"""API keys from Python, against a real registry over a real store."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from softprompt.cli import main
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore
from softprompt.errors import InvalidArgument, KeyNotFound
from softprompt.keys import KeyClient
from softprompt_api.access import Scope
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    store = EmbeddedStore(tmp_path, tmp_path / "logs", Stop())
    process = store.start()
    try:
        async with RegistryServer(Settings(address="127.0.0.1:0", redis_url=store.url, grace_s=0)) as server:
            yield f"127.0.0.1:{server.port}"
    finally:
        process.end(10)


async def test_a_key_is_made_listed_and_revoked(address: str) -> None:
    expires_at = datetime.now(UTC) + timedelta(days=1)

    def live() -> None:
        with KeyClient(address) as client:
            assert not client.was_any_made()
            key, plain = client.create([Scope.INFER])
            assert key.startswith("sk-sp-")
            assert client.was_any_made()
            assert (plain.tenant, plain.scopes, plain.adapters, plain.expires_at) == (
                "default",
                ("infer",),
                (),
                "",
            )
            _, full = client.create(
                [Scope.ADAPTERS_READ, Scope.INFER],
                tenant="acme",
                name="the shop's",
                adapters=["tweets"],
                requests_per_minute=1,
                tokens_per_minute=2,
                parallel_requests=3,
                expires_at=expires_at,
            )
            assert full.as_dict() == {
                "id": full.id,
                "tenant": "acme",
                "scopes": ["adapters:read", "infer"],
                "adapters": ["tweets"],
                "requests_per_minute": 1,
                "tokens_per_minute": 2,
                "parallel_requests": 3,
                "created_at": full.created_at,
                "expires_at": expires_at.isoformat(timespec="seconds"),
                "name": "the shop's",
            }
            assert client.keys() == sorted([plain, full], key=lambda info: info.id)
            client.revoke(plain.id)
            assert client.keys() == [full]
            with pytest.raises(KeyNotFound):
                client.revoke(plain.id)
            with pytest.raises(InvalidArgument, match="at least one of infer"):
                client.create([])

    await asyncio.to_thread(live)


async def test_all_keys_are_listed_over_pages(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.keys._PAGE_SIZE", 2)

    def live() -> None:
        with KeyClient(address) as client:
            made = {client.create([Scope.INFER])[1].id for _ in range(5)}
            listed = client.keys()
        assert [info.id for info in listed] == sorted(made)

    await asyncio.to_thread(live)


async def test_a_key_of_any_name_is_listed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    def live() -> None:
        with KeyClient(address) as client:
            for name in ("[/acme]", "[prod] bot"):
                client.create([Scope.INFER], name=name)
        with pytest.raises(SystemExit) as ended:
            main(["key", "ls", "--registry", address])
        assert ended.value.code == 0

    await asyncio.to_thread(live)
    listed = capsys.readouterr().out
    assert "[/acme]" in listed
    assert "[prod] bot" in listed
