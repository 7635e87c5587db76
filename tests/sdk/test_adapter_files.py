"""An adapter named by folder or hub id is found and checked on this machine."""

import os
import subprocess
import sys
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


def test_a_hub_source_is_fetched_at_its_revision_over_a_real_socket(
    hub: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter(52, 4)
    hub.put("somebody/tweets", folder)
    hub.files["somebody/tweets"]["adapter_model.bin"] = b"\x80never fetched"
    code = "import sys; from softprompt.adapter_files import find_adapter; print(find_adapter(sys.argv[1]).digest)"
    for source in ("hf://somebody/tweets", "hf://somebody/tweets@v1", "somebody/tweets"):
        done = subprocess.run(
            [sys.executable, "-c", code, source],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / source.replace("/", "-"))},
        )
        assert done.stdout.strip() == find_adapter(folder).digest, done.stderr
    assert any("v1" in path for path in hub.asked)
    assert not [path for path in hub.asked if path.endswith((".bin", ".md"))]


@pytest.mark.parametrize("path", ["hf://", "hf://tweets", "hf://a/b/c", "hf://a/b@", "hf://a/b@../x y"])
def test_what_is_no_hub_source_is_refused(path: str) -> None:
    with pytest.raises(AdapterInvalid, match="is not hf://owner/name"):
        find_adapter(path)


def test_a_file_url_is_its_folder(folder: Path) -> None:
    assert find_adapter(f"file://{folder}").digest == find_adapter(folder).digest


def test_a_path_that_the_system_cannot_look_up_is_told() -> None:
    # From Python 3.14 on, what cannot be looked up does not exist.
    with pytest.raises(AdapterInvalid, match=r"^cannot read .*: File name too long$|^there is no folder "):
        find_adapter("x" * 300)
