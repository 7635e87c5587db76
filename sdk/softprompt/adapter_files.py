"""An adapter as a user names it, a folder or a hub id, found and checked on this machine."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from softprompt_api.errors import AdapterInvalid, Unavailable
from softprompt_api.formats import (
    CONFIG_FILE,
    TENSORS_FILE,
    AdapterFiles,
    AdapterSpec,
    AdapterVerifier,
    ModelShape,
    adapter_digest,
    parse_config,
    read_folder,
)
from softprompt_api.names import shown

_CHUNK_BYTES = 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SOURCE = re.compile(rf"hf://(?P<id>{_HUB_ID.pattern})(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAdapter:
    """An adapter's two files on this machine, the config parsed and the tensors hashed.

    Attributes:
        files: the config's text and where the tensors are.
        spec: the parsed config.
        size_bytes, sha256: of the tensor file.
        digest: the identity of the content.
    """

    files: AdapterFiles
    spec: AdapterSpec
    size_bytes: int
    sha256: str
    digest: str


def find_adapter(path: str | Path) -> LocalAdapter:
    """The adapter in a folder, or of `owner/name` or `hf://owner/name@revision` on the hub.

    AdapterInvalid or Unavailable say what is wrong with it.
    """
    size_bytes, digest = 0, hashlib.sha256()
    try:
        files = read_folder(_folder(str(path)))
        spec = parse_config(files.config_json)
        for chunk in chunks(files.tensors_path):
            size_bytes += len(chunk)
            digest.update(chunk)
    except OSError as error:
        raise AdapterInvalid(f"cannot read {shown(str(path))}: {error.strerror}", field="path") from None
    sha256 = digest.hexdigest()
    return LocalAdapter(
        files=files, spec=spec, size_bytes=size_bytes, sha256=sha256, digest=adapter_digest(spec, sha256)
    )


def check_tensors(adapter: LocalAdapter, model: ModelShape) -> bytes:
    """The tensor file's bytes after every check against the model that is to use it; AdapterInvalid otherwise."""
    verifier = AdapterVerifier(adapter.spec, size_bytes=adapter.size_bytes, sha256=adapter.sha256, model=model)
    data = b"".join(chunks(adapter.files.tensors_path))
    verifier.feed(data)
    verifier.finish()
    return data


def chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces of at most 1 MiB."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _folder(path: str) -> Path:
    if path.startswith("hf://"):
        match = _HUB_SOURCE.fullmatch(path)
        if match is None:
            raise AdapterInvalid(f"{shown(path)} is not hf://owner/name or hf://owner/name@revision", field="path")
        return _download(match["id"], match["revision"])
    if path.startswith("file://"):
        return Path(unquote(urlsplit(path).path))
    try:
        folder = Path(path).expanduser()
    except RuntimeError:
        raise AdapterInvalid(f"there is no home folder for {shown(path)}", field="path") from None
    if folder.exists() or not _HUB_ID.fullmatch(path):
        return folder
    return _download(path)


def _download(hub_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub id, with nothing in it but the adapter's two files."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise AdapterInvalid(
            f"there is no folder {hub_id}; to take it from the hub as an id, `pip install huggingface_hub`",
            field="path",
        ) from error
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[CONFIG_FILE, TENSORS_FILE],
                etag_timeout=_HUB_TIMEOUT_S,
            )
        )
    except Exception as error:  # whatever the hub client or its transport raises ends in one plain answer
        why = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise Unavailable(
            f"there is no folder {hub_id}, and it could not be fetched from the hub ({why}); check the path"
        ) from error
