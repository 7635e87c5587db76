"""Sources of imports: spellings, folders below a root and nothing outside of it, and the hub."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import Mock

import pytest
from softprompt_api.errors import (
    AdapterInvalid,
    AdapterNotFound,
    InvalidArgument,
    Overloaded,
    Unavailable,
    Unsupported,
)
from softprompt_registry.sources import Files, Folders, FolderSource, Hub, HubSource, parse_source

TENSORS = bytes(range(256)) * 10_000  # more than one piece
CONFIG = '{"peft_type": "PROMPT_TUNING"}'


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("hf://some-body/tweets.v2", HubSource(repository="some-body/tweets.v2", revision="main")),
        ("hf://a/b@v1", HubSource(repository="a/b", revision="v1")),
        ("hf://a/b@refs/pr/1", HubSource(repository="a/b", revision="refs/pr/1")),
        ("file:///srv/adapters/a", FolderSource(path=PurePosixPath("/srv/adapters/a"))),
        ("file://localhost/srv/a%20b", FolderSource(path=PurePosixPath("/srv/a b"))),
    ],
)
def test_a_source_is_a_repository_or_a_folder(source: str, parsed: HubSource | FolderSource) -> None:
    assert parse_source(source) == parsed


@pytest.mark.parametrize(
    "source",
    [
        "",
        "tweets",
        "a/b",
        "hf://a",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/b@../../etc",
        "hf://a/..",
        "hf://a/b?x=1",
        "hf://user@host/a/b",
        "http://127.0.0.1/a",
        "https://huggingface.co/a/b",
        "s3://a/b",
        "file://",
        "file:srv",
        "file://host/srv/a",
        "file:///srv/../etc",
        "file:///srv/%2e%2e/etc",
        "file:///srv/a?b",
        "file:///srv/a#b",
        "file:///srv/a%00b",
        "file:///srv/%ff",
        "file://[/srv",
        "hf://a/b\n",
    ],
)
def test_anything_else_is_refused_by_field(source: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_source(source)
    assert refused.value.field == "source"


def folder_of(path: Path) -> FolderSource:
    return FolderSource(path=PurePosixPath(path))


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(TENSORS)
    (folder / "adapter_model.bin").write_bytes(b"\x80never read")
    return folder


async def read(source: Any, path: Any) -> tuple[str, bytes, Files]:
    async with source.read(path) as files:
        return files.config_json, files.tensors.read(), files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def folders(root: Path) -> Folders:
    return Folders(root, max_size_bytes=len(TENSORS))


async def test_the_two_files_of_a_folder_are_read(root: Path, folders: Folders) -> None:
    config, tensors, files = await read(folders, folder_of(fill(root / "deep" / "tweets")))
    assert (config, tensors) == (CONFIG, TENSORS)
    assert (files.size_bytes, files.sha256) == (len(TENSORS), hashlib.sha256(TENSORS).hexdigest())
    assert files.tensors.closed


async def test_links_are_followed_below_the_root(root: Path, folders: Folders) -> None:
    # As the hub's client lays out its cache.
    fill(root / "blobs")
    (root / "snapshot").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    (root / "alias").symlink_to(root / "snapshot")
    for name in ("snapshot", "alias"):
        assert (await read(folders, folder_of(root / name)))[1] == TENSORS


async def test_the_root_may_be_a_link_itself(root: Path, tmp_path: Path) -> None:
    fill(root / "tweets")
    (tmp_path / "link").symlink_to(root)
    folders = Folders(tmp_path / "link", max_size_bytes=len(TENSORS))
    for place in (root, tmp_path / "link"):
        assert (await read(folders, folder_of(place / "tweets")))[1] == TENSORS


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
async def test_a_file_that_a_link_leads_outside_to_is_not_read(
    root: Path, folders: Folders, tmp_path: Path, name: str
) -> None:
    outside, inside = fill(tmp_path / "outside"), fill(root / "tweets")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    with pytest.raises(InvalidArgument, match="outside of what may be imported") as refused:
        await read(folders, folder_of(inside))
    assert refused.value.field == "source"


async def test_a_folder_outside_is_refused_alike_whether_it_is_there_or_not(
    root: Path, folders: Folders, tmp_path: Path
) -> None:
    there = fill(tmp_path / "outside")
    fill(tmp_path / "root2")  # a name that begins like the root's
    (root / "link").symlink_to(there)
    (root / "loop").symlink_to(root / "loop")
    messages = set()
    for path in (there, tmp_path / "nothing", tmp_path / "root2", root / "link", Path("/proc/self/root") / there):
        with pytest.raises(InvalidArgument) as refused:
            await read(folders, folder_of(path))
        messages.add(refused.value.message)
    assert messages == {"the source lies outside of what may be imported"}
    with pytest.raises(AdapterNotFound):
        await read(folders, folder_of(root / "loop"))


async def test_a_folder_on_the_way_that_becomes_a_link_is_noticed(
    root: Path, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "outside")
    inside = fill(root / "tweets")
    open_file = os.open

    def swap_and_open(path: Any, flags: int) -> int:
        inside.rename(root / "old")
        inside.symlink_to(tmp_path / "outside")
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(InvalidArgument, match="outside"):
        await read(folders, folder_of(inside))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("become", ["absent", "a folder", "a pipe"])
async def test_what_is_no_file_is_named(root: Path, folders: Folders, name: str, become: str) -> None:
    path = fill(root / "tweets") / name
    path.unlink()
    if become == "a folder":
        path.mkdir()
    elif become == "a pipe":
        os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(AdapterNotFound, match=f"has no {name}"):
        await read(folders, folder_of(root / "tweets"))


async def test_files_have_limits(root: Path) -> None:
    folder = fill(root / "tweets")
    with pytest.raises(AdapterInvalid) as refused:
        await read(Folders(root, max_size_bytes=len(TENSORS) - 1), folder_of(folder))
    assert refused.value.field == "tensors_size_bytes"
    (folder / "adapter_config.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(AdapterInvalid) as refused:
        await read(Folders(root, max_size_bytes=len(TENSORS)), folder_of(folder))
    assert refused.value.field == "config_json"
    (folder / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(AdapterInvalid, match="not UTF-8"):
        await read(Folders(root, max_size_bytes=len(TENSORS)), folder_of(folder))


async def test_without_a_root_nothing_is_read_and_the_flag_is_named(root: Path) -> None:
    with pytest.raises(Unsupported, match="--allow-file-imports ROOT"):
        await read(Folders(None, max_size_bytes=1), folder_of(fill(root / "tweets")))


# Of the hub, over real sockets.


@pytest.mark.parametrize("repository", ["somebody/tweets.git", "somebody/a--b", "somebody/tweets-"])
async def test_a_name_that_no_repository_of_the_hub_has_is_refused(repository: str) -> None:
    hub = Hub(is_allowed=True, max_size_bytes=len(TENSORS), endpoint="http://127.0.0.1:1")
    with pytest.raises(InvalidArgument, match=repository) as refused:
        await read(hub, HubSource(repository=repository, revision="main"))
    assert refused.value.field == "source"


REPOSITORY = HubSource(repository="somebody/tweets", revision="main")


@pytest.fixture
def published(hub: Any, tmp_path: Path) -> Any:
    hub.put("somebody/tweets", fill(tmp_path / "published"))
    return hub


def client(hub: Any, *, is_allowed: bool = True, max_size_bytes: int = len(TENSORS)) -> Hub:
    return Hub(is_allowed=is_allowed, max_size_bytes=max_size_bytes, endpoint=hub.url)


@pytest.mark.parametrize("revision", ["main", "v1"])
async def test_the_two_files_of_a_repository_are_read_from_one_commit(published: Any, revision: str) -> None:
    source = HubSource(repository="somebody/tweets", revision=revision)
    config, tensors, files = await read(client(published), source)
    assert (config, tensors) == (CONFIG, TENSORS)
    assert (files.size_bytes, files.sha256) == (len(TENSORS), hashlib.sha256(TENSORS).hexdigest())
    place = "/somebody/tweets/resolve"
    assert published.asked == [
        f"{place}/{revision}/adapter_config.json",
        f"{place}/{published.COMMIT}/adapter_model.safetensors",
        "/cdn/somebody/tweets/adapter_model.safetensors",
    ]


async def test_without_permission_the_hub_is_not_asked_and_the_flag_is_named(published: Any) -> None:
    with pytest.raises(Unsupported, match="--allow-hub-imports") as refused:
        await read(client(published, is_allowed=False), REPOSITORY)
    assert refused.value.field == "source"
    assert published.asked == []


@pytest.mark.parametrize(
    "source",
    [
        HubSource(repository="somebody/nothing", revision="main"),
        HubSource(repository="somebody/tweets", revision="v9"),
    ],
)
async def test_what_the_hub_does_not_have_is_not_found(published: Any, source: HubSource) -> None:
    with pytest.raises(AdapterNotFound, match="the hub has no public"):
        await read(client(published), source)


async def test_a_repository_without_tensors_is_told(published: Any) -> None:
    del published.files["somebody/tweets"]["adapter_model.safetensors"]
    with pytest.raises(AdapterNotFound, match=r"with adapter_model\.safetensors"):
        await read(client(published), REPOSITORY)


async def test_a_tensor_file_over_the_limit_is_refused_before_it_is_read(published: Any) -> None:
    with pytest.raises(AdapterInvalid) as refused:
        await read(client(published, max_size_bytes=len(TENSORS) - 1), REPOSITORY)
    assert refused.value.field == "tensors_size_bytes"


async def test_a_config_over_the_limit_is_refused(published: Any) -> None:
    published.files["somebody/tweets"]["adapter_config.json"] = b" " * (2**20 + 1)
    with pytest.raises(AdapterInvalid) as refused:
        await read(client(published), REPOSITORY)
    assert refused.value.field == "config_json"


@pytest.fixture
def full_disk() -> Iterator[Any]:
    with Path("/dev/full").open("r+b", buffering=0) as file:
        yield file


async def test_where_there_is_no_room_for_a_file_that_is_told(
    published: Any, full_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(return_value=full_disk))
    with pytest.raises(Overloaded, match="No space left"):
        await read(client(published), REPOSITORY)
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=FileNotFoundError(2, "No usable folder")))
    with pytest.raises(Overloaded, match="No usable folder"):
        await read(client(published), REPOSITORY)


async def test_a_hub_that_breaks_off_is_unavailable(published: Any) -> None:
    published.told_bytes["adapter_model.safetensors"] = len(TENSORS) + 1
    with pytest.raises(Unavailable):
        await read(client(published, max_size_bytes=2 * len(TENSORS)), REPOSITORY)


async def test_a_hub_that_is_not_there_is_unavailable(published: Any) -> None:
    hub = Hub(is_allowed=True, max_size_bytes=1, endpoint="http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="the hub cannot be reached"):
        await read(hub, REPOSITORY)
