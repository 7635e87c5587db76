"""Where adapters may be imported from: folders below one root of this machine, and public repositories of the hub.

Of either, adapter_config.json and adapter_model.safetensors are read, within limits, and nothing else. The tensors
are hashed on the way: a registration says at its beginning what will follow.
"""

import asyncio
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

from softprompt_api.errors import (
    AdapterInvalid,
    AdapterNotFound,
    InvalidArgument,
    Overloaded,
    Unavailable,
    Unsupported,
)
from softprompt_api.formats import CONFIG_FILE, MAX_CONFIG_BYTES, TENSORS_FILE
from softprompt_api.names import shown

if TYPE_CHECKING:
    import httpx

PIECE_BYTES = 2**20
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 60.0
_HUB_SOURCE = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][\w./-]{0,127}))?",
    re.ASCII,
)
_FIELD = "source"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of the hub, at a branch, tag or commit."""

    repository: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """An absolute path on this machine."""

    path: PurePosixPath


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """An adapter's two files: the config's text, and the tensors, open at their beginning."""

    config_json: str
    tensors: BinaryIO
    size_bytes: int
    sha256: str


def parse_source(source: str) -> HubSource | FolderSource:
    """`hf://owner/name[@revision]` or `file:///folder`; InvalidArgument for anything else."""
    if source.startswith("file:"):
        return _parse_folder(source)
    match = _HUB_SOURCE.fullmatch(source)
    if match is None or ".." in source:
        raise InvalidArgument(
            f"{shown(source)} is no source; hf://owner/name, hf://owner/name@revision and file:///folder are",
            field=_FIELD,
        )
    return HubSource(repository=match["repository"], revision=match["revision"] or "main")


def _parse_folder(source: str) -> FolderSource:
    try:
        parts = urlsplit(source)
        path = PurePosixPath(unquote(parts.path, errors="strict"))
    except ValueError:
        raise InvalidArgument(f"{shown(source)} is not a file:/// URL", field=_FIELD) from None
    plain = parts.netloc in ("", "localhost") and not parts.query and not parts.fragment
    if not plain or not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise InvalidArgument(
            f"{shown(source)} must be file:/// and an absolute path, without '..', '?' and '#'", field=_FIELD
        )
    return FolderSource(path=path)


class Folders:
    """Folders below a root.

    Args:
        root: None: nothing may be read.
        max_size_bytes: largest tensor file.
    """

    def __init__(self, root: Path | None, *, max_size_bytes: int) -> None:
        self._root = None if root is None else Path(os.path.realpath(root))
        self._max_size_bytes = max_size_bytes

    @asynccontextmanager
    async def read(self, source: FolderSource) -> AsyncIterator[Files]:
        """The files of a folder, for the time of the context."""
        if self._root is None:
            raise Unsupported(
                "imports from files are not allowed here; start the registry with --allow-file-imports ROOT",
                field=_FIELD,
            )
        config_json, tensors = await asyncio.to_thread(self._open, self._root, source.path)
        with tensors:
            size_bytes, sha256 = await asyncio.to_thread(self._hash, tensors)
            yield Files(config_json=config_json, tensors=tensors, size_bytes=size_bytes, sha256=sha256)

    def _open(self, root: Path, folder: PurePosixPath) -> tuple[str, BinaryIO]:
        with _open_below(root, folder, CONFIG_FILE) as config:
            text = _config_text(config.read(MAX_CONFIG_BYTES + 1))
        return text, _open_below(root, folder, TENSORS_FILE)

    def _hash(self, tensors: BinaryIO) -> tuple[int, str]:
        size_bytes, digest = 0, hashlib.sha256()
        while piece := tensors.read(PIECE_BYTES):
            size_bytes += len(piece)
            _check_size(size_bytes, self._max_size_bytes)
            digest.update(piece)
        tensors.seek(0)
        return size_bytes, digest.hexdigest()


def _open_below(root: Path, folder: PurePosixPath, name: str) -> BinaryIO:
    """Open a regular file that really lies below the root, whatever links lead to it."""
    path = Path(os.path.realpath(Path(folder) / name))
    if not path.is_relative_to(root):
        raise _outside()
    try:
        # A device or a pipe must not be waited for before it is known to be one.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        raise _lacks(name) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _lacks(name)
        # What was opened counts: a folder on the way may have become a link meanwhile.
        opened = Path(os.path.realpath(f"/proc/self/fd/{fd}"))
        if opened.is_absolute() and Path("/proc/self/fd").exists() and not opened.is_relative_to(root):
            raise _outside()
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def _outside() -> InvalidArgument:
    return InvalidArgument("the source lies outside of what may be imported", field=_FIELD)


def _lacks(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"the source has no {name} that can be read", field=_FIELD)


class Hub:
    """Public repositories of the hub; no account of this machine is used.

    Args:
        is_allowed: whether anything may be fetched.
        max_size_bytes: largest tensor file.
        endpoint: the hub's address; None: huggingface_hub's own, HF_ENDPOINT where that is set.
    """

    def __init__(self, *, is_allowed: bool, max_size_bytes: int, endpoint: str | None = None) -> None:
        self._is_allowed = is_allowed
        self._max_size_bytes = max_size_bytes
        self._endpoint = endpoint

    @asynccontextmanager
    async def read(self, source: HubSource) -> AsyncIterator[Files]:
        """The files of a repository, for the time of the context; both of one commit."""
        if not self._is_allowed:
            raise Unsupported(
                "imports from the hub are not allowed here; start the registry with --allow-hub-imports",
                field=_FIELD,
            )
        import httpx

        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        with ExitStack() as stack:
            try:
                tensors = stack.enter_context(tempfile.TemporaryFile())
                async with httpx.AsyncClient(
                    headers={"user-agent": "softprompt", "accept-encoding": "identity"},
                    follow_redirects=True,
                    timeout=timeout,
                ) as client:
                    config, commit = await self._fetch_config(client, source)
                    size_bytes, sha256 = await self._fetch_tensors(client, source, commit, tensors)
            except httpx.HTTPError as error:
                raise Unavailable("the hub cannot be reached, or broke off; try again later") from error
            except OSError as error:
                raise Overloaded(
                    f"there is no room for the adapter here ({error.strerror or error}); try again later"
                ) from error
            tensors.seek(0)
            yield Files(config_json=_config_text(config), tensors=tensors, size_bytes=size_bytes, sha256=sha256)

    async def _fetch_config(self, client: "httpx.AsyncClient", source: HubSource) -> tuple[bytes, str]:
        """The config, and the commit that the revision stands for."""
        async with self._open(client, source, source.revision, CONFIG_FILE) as response:
            first = [*response.history, response][0]
            data = bytearray()
            async for piece in response.aiter_bytes(PIECE_BYTES):
                data += piece
                if len(data) > MAX_CONFIG_BYTES:
                    break
            return bytes(data), first.headers.get("x-repo-commit", source.revision)

    async def _fetch_tensors(
        self, client: "httpx.AsyncClient", source: HubSource, commit: str, file: BinaryIO
    ) -> tuple[int, str]:
        size_bytes, digest = 0, hashlib.sha256()
        async with self._open(client, source, commit, TENSORS_FILE) as response:
            _check_size(int(response.headers.get("content-length", 0)), self._max_size_bytes)
            async for piece in response.aiter_bytes(PIECE_BYTES):
                size_bytes += len(piece)
                _check_size(size_bytes, self._max_size_bytes)
                digest.update(piece)
                await asyncio.to_thread(file.write, piece)
        return size_bytes, digest.hexdigest()

    @asynccontextmanager
    async def _open(
        self, client: "httpx.AsyncClient", source: HubSource, revision: str, name: str
    ) -> AsyncIterator["httpx.Response"]:
        from huggingface_hub import hf_hub_url

        try:
            url = hf_hub_url(source.repository, name, revision=revision, endpoint=self._endpoint)
        except ValueError:  # "--" in a name, or ".git" at its end
            raise InvalidArgument(
                f"{shown(source.repository, 200)} is no repository that the hub could have", field=_FIELD
            ) from None
        async with client.stream("GET", url) as response:
            if response.status_code in (401, 403, 404):
                raise AdapterNotFound(
                    f"the hub has no public {shown(source.repository, 200)} at {shown(source.revision, 200)} with "
                    f"{name}",
                    field=_FIELD,
                )
            response.raise_for_status()
            yield response


def _config_text(data: bytes) -> str:
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes", field="config_json")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise AdapterInvalid(f"{CONFIG_FILE} is not UTF-8", field="config_json") from None


def _check_size(size_bytes: int, max_size_bytes: int) -> None:
    if size_bytes > max_size_bytes:
        raise AdapterInvalid(
            f"{TENSORS_FILE} has more than {max_size_bytes} bytes, the most that is accepted",
            field="tensors_size_bytes",
        )
