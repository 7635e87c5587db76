"""Imports over gRPC: a real registry reads real files, where its settings allow it."""

import json
from pathlib import Path

import pytest
from softprompt_api.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    InvalidArgument,
    Overloaded,
    Unsupported,
)
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry import imports
from softprompt_registry.settings import Settings, SettingsError, read_settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def settings(settings: Settings, root: Path) -> Settings:
    return settings.model_copy(update={"allow_file_imports": root})


@pytest.fixture
def write(root: Path, make_adapter):
    """Write an adapter into a folder below the root; its source."""

    def write(name: str, seed: int = 0) -> str:
        adapter = make_adapter(seed)
        (root / name).mkdir(exist_ok=True)
        (root / name / "adapter_config.json").write_text(json.dumps(adapter.config))
        (root / name / "adapter_model.safetensors").write_bytes(adapter.tensors)
        return f"file://{root / name}"

    return write


async def import_(client, name: str, source: str, **fields: object) -> pb.ImportAdapterResponse:
    return await client.answer(
        client.stub.ImportAdapter(pb.ImportAdapterRequest(name=name, source=source, **fields), timeout=60)
    )


async def test_an_imported_folder_is_the_adapter_that_an_upload_would_be(client, make_adapter, write, content):
    answer = await import_(client, "tweets", write("a"), labels={"team": "x"})
    made = answer.adapter
    assert (made.name, made.version, dict(made.labels)) == ("tweets", 1, {"team": "x"})
    assert await client.get("tweets") == made
    assert await client.read(made.digest) == make_adapter().tensors
    assert (await client.register("uploaded", make_adapter())).digest == made.digest


async def test_an_import_is_made_once_with_an_idempotency_key(client, write):
    source = write("a", seed=1)
    first = await import_(client, "tweets", source, idempotency_key="once")
    assert (await import_(client, "tweets", source, idempotency_key="once")).adapter == first.adapter
    write("a", seed=2)
    with pytest.raises(AdapterConflict):
        await import_(client, "tweets", source, idempotency_key="once")
    assert await client.versions("tweets") == [1]


async def test_what_is_wrong_with_the_files_is_told_and_nothing_is_left(client, root, write, redis):
    source = write("a")
    (root / "a" / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(AdapterInvalid, match="zip or torch"):
        await import_(client, "tweets", source)
    with pytest.raises(AdapterNotFound):
        await import_(client, "tweets", f"file://{root}/nothing")
    with pytest.raises(InvalidArgument, match="outside"):
        await import_(client, "tweets", "file:///etc")
    assert await redis.keys("sp:{*") == []


async def test_the_hub_stays_closed_unless_it_is_allowed(client):
    with pytest.raises(Unsupported, match="--allow-hub-imports"):
        await import_(client, "tweets", "hf://somebody/tweets")


async def test_a_bad_name_is_refused_before_anything_is_read(client):
    with pytest.raises(InvalidArgument) as refused:
        await import_(client, "Tweets", "file:///etc")
    assert refused.value.field == "name"


async def test_more_imports_than_are_allowed_are_overload(client, write, monkeypatch):
    check = imports.Shares._check
    monkeypatch.setattr(imports.Shares, "_check", lambda shares, tenant, _: check(shares, tenant, 10**6))
    with pytest.raises(Overloaded, match="0 imports are running, and at most 4 may"):
        await import_(client, "tweets", write("a"))


def test_the_root_must_be_a_folder_that_is_there(tmp_path):
    assert read_settings(["--allow-file-imports", str(tmp_path)]).allow_file_imports == tmp_path
    with pytest.raises(SettingsError, match="allow_file_imports"):
        read_settings(["--allow-file-imports", str(tmp_path / "nothing")])


async def test_a_tenants_import_is_the_tenants_alone(client, write):
    made = [
        (await import_(client, name, write(f"folder-{seed}", seed), idempotency_key="once")).adapter
        for seed, name in enumerate(("tweets", "acme/tweets"))
    ]
    assert [(version.name, version.version) for version in made] == [("tweets", 1), ("acme/tweets", 1)]
    assert await client.get("acme/tweets") == made[1]
