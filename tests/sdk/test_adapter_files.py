"""An adapter named by folder or hub id is found and checked on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from softprompt.adapter_files import check_tensors, find_adapter
from softprompt_api.errors import AdapterInvalid, Unavailable
from softprompt_api.formats import ModelShape

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(make_adapter: MakeAdapter) -> Path:
    return make_adapter(50, 4)


def test_a_folder_is_read_and_its_content_named(folder: Path, make_adapter: MakeAdapter) -> None:
    adapter = find_adapter(folder)
    assert (adapter.spec.num_virtual_tokens, adapter.spec.hidden_size) == (4, 64)
    assert adapter.size_bytes == adapter.files.tensors_path.stat().st_size
    assert adapter.digest == find_adapter(str(folder)).digest
    assert adapter.digest != find_adapter(make_adapter(51, 4)).digest


def test_the_tensors_are_checked_against_the_model(folder: Path) -> None:
    adapter = find_adapter(folder)
    data = check_tensors(adapter, ModelShape(hidden_size=64, max_virtual_tokens=4, dtype="float32"))
    assert data == adapter.files.tensors_path.read_bytes()
    with pytest.raises(AdapterInvalid, match="hidden size 64, the base model has 65"):
        check_tensors(adapter, ModelShape(hidden_size=65, max_virtual_tokens=4, dtype="float32"))


def test_a_hub_id_is_fetched_with_nothing_but_the_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_adapter("somebody/tweets").digest == find_adapter(folder).digest
    assert asked == [("somebody/tweets", ["adapter_config.json", "adapter_model.safetensors"])]


def test_a_hub_that_cannot_be_reached_is_told_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(Unavailable, match=r"no folder somebody/tweets, .* \(Name or service not known\); check"):
        find_adapter("somebody/tweets")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_path_that_is_no_hub_id_is_never_asked_of_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AdapterInvalid, match="there is no folder"):
        find_adapter(path)
