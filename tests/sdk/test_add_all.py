"""`softprompt adapter add-all` against a real registry."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest
from redis.asyncio import Redis
from softprompt.cli import main


async def add_all(*arguments: str) -> int | str | None:
    """The status that the command ends with."""

    def run() -> int | str | None:
        with pytest.raises(SystemExit) as ended:
            main(("adapter", "add-all", *arguments))
        return ended.value.code

    return await asyncio.to_thread(run)


def said_by(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """The lines of both streams, without those that the registry's log has, here in the same process."""
    out, err = (text.splitlines() for text in capsys.readouterr())
    return [line for line in out if not re.match(r".{19} \[", line)], err


async def test_each_folder_becomes_an_adapter_once(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Tweets-v1", "sms"):
        shutil.copytree(folder, tmp_path / "all" / name)
    (tmp_path / "all" / "notes").mkdir()  # is none
    flags = (str(tmp_path / "all"), "--base-model", "org/Two", "--registry", address)
    assert await add_all(*flags) == 0
    out, err = said_by(capsys)
    assert out == ["sms@1 is ready: 4 virtual tokens", "tweets-v1@1 is ready: 4 virtual tokens"]
    assert err[-1] == "2 added"
    shutil.copytree(folder, tmp_path / "all" / "late")
    assert await add_all(*flags, "--json") == 0
    out, err = said_by(capsys)
    told = json.loads("\n".join(out))
    assert [(one["state"], one["name"], one["version"], one["base_model"]) for one in told] == [
        ("added", "late", 1, "org/Two"),
        ("unchanged", "sms", 1, "org/Two"),
        ("unchanged", "tweets-v1", 1, "org/Two"),
    ]
    assert err[-1] == "1 added, 2 unchanged"
    assert await add_all(*flags, "--tenant", "acme") == 0
    assert "acme/sms@1 is ready: 4 virtual tokens" in said_by(capsys)[0]


async def test_what_is_refused_keeps_no_other_from_it(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Twin", "twin", "a b", "whole"):
        shutil.copytree(folder, tmp_path / name)
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"\x80\x02no tensors")
    assert await add_all(str(tmp_path), "--base-model", "org/One", "--registry", address) == 1
    out, err = said_by(capsys)
    assert out == ["whole@1 is ready: 4 virtual tokens"]
    refused = {line.split(" is refused: ")[0]: line for line in err if " is refused: " in line}
    assert sorted(refused) == ["Twin", "a b", "broken", "twin"]
    assert "another folder would be twin too" in refused["Twin"]
    assert "is not an adapter name" in refused["a b"]
    assert "pickle" in refused["broken"]
    assert err[-1] == "softprompt: 1 added, 4 refused"


async def test_a_registry_that_is_away_ends_it_at_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        shutil.copytree(folder, tmp_path / name)
    assert await add_all(str(tmp_path), "--registry", "127.0.0.1:1") == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "no registry answers at 127.0.0.1:1" in said.err


async def test_a_folder_without_adapters_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await add_all(str(tmp_path)) == 1
    assert f"no folder in {tmp_path} has adapter_config.json" in capsys.readouterr().err
    assert await add_all(str(tmp_path / "none")) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["weak"], indirect=True)
async def test_warnings_of_the_registry_are_told(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "all" / "tweets")
    assert await add_all(str(tmp_path / "all"), "--base-model", "org/One", "--registry", address) == 0
    _, err = said_by(capsys)
    assert any(line.startswith("warning: tweets: the registry was started with --durability weak") for line in err)


async def test_a_damaged_record_keeps_no_other_from_it(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        shutil.copytree(folder, tmp_path / "all" / name)
    flags = (str(tmp_path / "all"), "--base-model", "org/One", "--registry", address)
    assert await add_all(*flags) == 0
    async with Redis(unix_socket_path=str(tmp_path / "store" / "store.sock")) as store:
        await store.hset("sp:{v:1}", "rank", "9")
    capsys.readouterr()
    assert await add_all(*flags) == 1
    out, err = said_by(capsys)
    assert out == ["second@1 has it already: 4 virtual tokens"]
    assert err[0].startswith("first is refused: the stored version with id 1 cannot be read")
