"""The registry from Python, against a real one over a real store."""

import asyncio
import json
from pathlib import Path

import pytest
from softprompt.cli import main
from softprompt.errors import InvalidArgument
from softprompt.registry import RegistryClient


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
