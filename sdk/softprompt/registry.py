"""The registry from Python: add, list, show, change and remove adapters of a running system."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC
from pathlib import Path
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from softprompt_api.errors import AdapterNotFound, InvalidArgument
from softprompt_api.names import check_full_name, parse_adapter
from softprompt_api.quality import Norms, Probe
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from softprompt_api.rpc.quality import norms_from, probe_of, warnings_of
from softprompt_api.rpc.tls import ClientTls

from softprompt.adapter_files import LocalAdapter, chunks, find_adapter
from softprompt.calls import ServiceClient

DEFAULT_ADDRESS = "127.0.0.1:2243"
_CALL_TIMEOUT_S = 20.0
_UPLOAD_TIMEOUT_S = 600.0
_PAGE_SIZE = 500

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One version of an adapter as the registry keeps it.

    Attributes:
        name, version: what requests call it; `name` alone means the latest version. A tenant other than
            the default one has `tenant/` before its adapters' names.
        id: integer, unique over all names and times.
        digest: identity of the content.
        kind: by PEFT's name, for example "PROMPT_TUNING".
        num_virtual_tokens: positions it puts before a prompt.
        hidden_size: of the model it was made for; 0 where its tensors do not say.
        num_tasks: tasks to choose from, as `name:0`; 0 for kinds without tasks.
        rank: the highest of a LoRA; 0 for other kinds.
        dtype: type of the tensors.
        size_bytes: of the tensor file.
        base_model: id of the model it was checked against.
        created_at: ISO 8601, UTC.
        labels: free text, given at registration or later.
        aliases: what points to it, in order; `latest` among them.
        pinned: whether it is kept from deletion.
        row_norms: of its virtual tokens' rows; None for kinds without such rows.
        vocabulary_norms: of the base model's embeddings, to compare with; None where not told.
        probe: what was measured of it last; None: nothing yet.
        warnings: what a person should know of it.
    """

    name: str
    version: int
    id: int
    digest: str
    kind: str
    num_virtual_tokens: int
    hidden_size: int
    num_tasks: int
    rank: int
    dtype: str
    size_bytes: int
    base_model: str
    created_at: str
    labels: dict[str, str]
    aliases: tuple[str, ...]
    pinned: bool
    row_norms: Norms | None
    vocabulary_norms: Norms | None
    probe: Probe | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {**asdict(self), "aliases": list(self.aliases), "warnings": list(self.warnings)}
        if self.probe is not None and self.probe.probed_at is not None:
            values["probe"] |= {
                "effects": list(values["probe"]["effects"]),
                "probed_at": self.probe.probed_at.isoformat(timespec="seconds"),
            }
        return values

    @property
    def size(self) -> str:
        """How large it is, as its kind counts: "rank 8", or "20 virtual tokens"."""
        return f"rank {self.rank}" if self.rank else f"{self.num_virtual_tokens} virtual tokens"


class RegistryClient(ServiceClient):
    """A connection to a registry; close it, or use it in a `with`.

    Every failed call raises an error of `softprompt_api.errors`.

    Args:
        address: `host:port` of the registry's gRPC.
        tls: how it is called; None: without TLS.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tls: ClientTls | None = None) -> None:
        super().__init__("registry", address, tls)
        self._stub = RegistryServiceStub(self._channel)

    def add(
        self,
        name: str,
        path: str | Path | LocalAdapter,
        *,
        labels: Mapping[str, str] | None = None,
        base_model: str = "",
        progress: Progress | None = None,
    ) -> tuple[AdapterInfo, list[str]]:
        """Upload a PEFT folder or a hub id; the version it became and the registry's warnings.

        Args:
            base_model: id of the base model that it is for; "": the one that is served.
            progress: is told (bytes sent, bytes in all).
        """
        check_full_name(name)
        adapter = path if isinstance(path, LocalAdapter) else find_adapter(path)
        with self._translated():
            response = self._stub.RegisterAdapter(
                _upload(name, adapter, labels or {}, base_model, progress), timeout=_UPLOAD_TIMEOUT_S
            )
        return info_of(response.adapter), list(response.warnings)

    def ensure(
        self, name: str, path: str | Path | LocalAdapter, *, base_model: str = ""
    ) -> tuple[AdapterInfo, bool]:
        """Register this content, unless the name has it as latest or newest version for this base model.

        Return the latest version, and whether it is new: with the registry's warnings then. If `latest` was moved
        back from this content, it stays: a start does not undo a rollback.

        Args:
            base_model: as in `add`; "": a version for any base model will do.
        """
        adapter = path if isinstance(path, LocalAdapter) else find_adapter(path)
        with contextlib.suppress(AdapterNotFound):
            newest = self._list_versions(name, size=1).versions  # none, where its record cannot be read
            latest = self.get(name)
            for version in (latest, *map(info_of, newest)):
                if version.digest == adapter.digest and base_model in ("", version.base_model):
                    return latest, False
        info, warnings = self.add(name, adapter, base_model=base_model)
        return replace(info, warnings=tuple(warnings)), True

    def get(self, adapter: str) -> AdapterInfo:
        """One version: `name`, `name@3`, `name@alias` or `sha256:…`."""
        return info_of(self.version(adapter))

    def version(self, adapter: str) -> pb.AdapterVersion:
        """One version, as the registry tells it: spelled as in `get`."""
        parse_adapter(adapter)
        with self._translated():
            return self._stub.GetAdapter(pb.GetAdapterRequest(adapter=adapter), timeout=_CALL_TIMEOUT_S).adapter

    def read(self, digest: str) -> Iterator[bytes]:
        """The tensor file of a version, in pieces; whoever takes them checks them."""
        with self._translated():
            request = pb.ReadTensorsRequest(digest=digest)
            for answer in self._stub.ReadTensors(iter([request]), timeout=_UPLOAD_TIMEOUT_S):
                yield answer.chunk.data

    def import_from(
        self, name: str, source: str, *, labels: Mapping[str, str] | None = None, base_model: str = ""
    ) -> tuple[AdapterInfo, list[str]]:
        """Have the registry read an adapter from a source that its settings allow; as `add` otherwise.

        Args:
            source: `hf://owner/name`, `hf://owner/name@revision`, or `file:///folder` on the registry's machine.
        """
        request = pb.ImportAdapterRequest(
            name=check_full_name(name), source=source, labels=labels or {}, base_model_id=base_model
        )
        with self._translated():
            response = self._stub.ImportAdapter(request, timeout=_UPLOAD_TIMEOUT_S)
        return info_of(response.adapter), list(response.warnings)

    def adapters(
        self, *, prefix: str = "", all_tenants: bool = False, labels: Mapping[str, str] | None = None
    ) -> list[AdapterInfo]:
        """The latest version of every name, in order of names: of the default tenant, or of all.

        Args:
            labels: which it must all have.
        """
        infos, token = [], ""
        while True:
            request = pb.ListAdaptersRequest(
                page_size=_PAGE_SIZE,
                page_token=token,
                name_prefix=prefix,
                all_tenants=all_tenants,
                labels=labels or {},
            )
            with self._translated():
                page = self._stub.ListAdapters(request, timeout=_CALL_TIMEOUT_S)
            infos += [info_of(version) for version in page.adapters]
            token = page.next_page_token
            if not token:
                return infos

    def first_adapters(self, count: int) -> tuple[list[AdapterInfo], int]:
        """The latest version of the first so many names, at most 1,000; and how many names there are."""
        with self._translated():
            page = self._stub.ListAdapters(pb.ListAdaptersRequest(page_size=count), timeout=_CALL_TIMEOUT_S)
        return [info_of(version) for version in page.adapters], page.total_size

    def versions(self, name: str) -> list[AdapterInfo]:
        """Every version of a name, newest first."""
        infos, token = [], ""
        while True:
            page = self._list_versions(name, size=_PAGE_SIZE, token=token)
            infos += [info_of(version) for version in page.versions]
            token = page.next_page_token
            if not token:
                return infos

    def _list_versions(self, name: str, *, size: int, token: str = "") -> pb.ListVersionsResponse:
        request = pb.ListVersionsRequest(name=name, page_size=size, page_token=token)
        with self._translated():
            return self._stub.ListVersions(request, timeout=_CALL_TIMEOUT_S)

    def set_alias(self, name: str, alias: str, version: int, *, expected: int | None = None) -> AdapterInfo:
        """Make `name@alias` stand for a version; only from the version `expected` (0: none), where it is given.

        Moving `latest` to an older version is a rollback.
        """
        request = pb.SetAliasRequest(name=name, alias=alias, version=version, expected_version=expected)
        with self._translated():
            return info_of(self._stub.SetAlias(request, timeout=_CALL_TIMEOUT_S).adapter)

    def remove_alias(self, name: str, alias: str, *, expected: int | None = None) -> None:
        """Remove an alias, not what it points to."""
        request = pb.SetAliasRequest(name=name, alias=alias, expected_version=expected)
        with self._translated():
            self._stub.SetAlias(request, timeout=_CALL_TIMEOUT_S)

    def update(
        self, adapter: str, *, labels: Mapping[str, str | None] | None = None, pinned: bool | None = None
    ) -> AdapterInfo:
        """Set labels of a version (None removes one, others stay), and its pin; what is not given stays."""
        labels = labels or {}
        request = pb.UpdateAdapterRequest(
            adapter=adapter,
            labels={key: value for key, value in labels.items() if value is not None},
            pinned=bool(pinned),
            update_mask=FieldMask(
                paths=[*(f"labels.{key}" for key in labels), *([] if pinned is None else ["pinned"])]
            ),
        )
        with self._translated():
            return info_of(self._stub.UpdateAdapter(request, timeout=_CALL_TIMEOUT_S).adapter)

    def remove(self, adapter: str) -> int:
        """Delete a name with all its versions, or `name@3` alone; how many versions went."""
        ref = parse_adapter(adapter)
        if ref.digest or ref.alias or (ref.is_latest and "@" in adapter):
            raise InvalidArgument(
                "say NAME@VERSION; aliases move, several versions may have one content, and deletions cannot be "
                "undone",
                field="adapter",
            )
        with self._translated():
            if ref.version is None:
                request = pb.DeleteAdapterRequest(name=ref.name)
                return self._stub.DeleteAdapter(request, timeout=_CALL_TIMEOUT_S).deleted_versions
            self._stub.DeleteVersion(
                pb.DeleteVersionRequest(name=ref.name, version=ref.version), timeout=_CALL_TIMEOUT_S
            )
            return 1


def _upload(
    name: str, adapter: LocalAdapter, labels: Mapping[str, str], base_model: str, progress: Progress | None
) -> Iterator[pb.RegisterAdapterRequest]:
    yield pb.RegisterAdapterRequest(
        header=pb.RegisterAdapterHeader(
            name=name,
            config_json=adapter.files.config_json,
            tensors_size_bytes=adapter.size_bytes,
            tensors_sha256=adapter.sha256,
            labels=labels,
            base_model_id=base_model,
        )
    )
    offset = 0
    for data in chunks(adapter.files.tensors_path):
        yield pb.RegisterAdapterRequest(chunk=pb.Chunk(offset=offset, data=data))
        offset += len(data)
        if progress is not None:
            progress(offset, adapter.size_bytes)


def info_of(version: pb.AdapterVersion) -> AdapterInfo:
    """A version, from its message."""
    return AdapterInfo(
        name=version.name,
        version=version.version,
        id=version.id,
        digest=version.digest,
        kind=version.kind,
        num_virtual_tokens=version.num_virtual_tokens,
        hidden_size=version.hidden_size,
        num_tasks=version.num_tasks,
        rank=version.rank,
        dtype=version.dtype,
        size_bytes=version.size_bytes,
        base_model=version.base_model.id,
        created_at=version.created_at.ToDatetime(tzinfo=UTC).isoformat(timespec="seconds"),
        labels=dict(version.labels),
        aliases=tuple(version.aliases),
        pinned=version.pinned,
        row_norms=norms_from(version),
        vocabulary_norms=norms_from(version.base_model),
        probe=probe_of(version),
        warnings=tuple(warnings_of(version)),
    )
