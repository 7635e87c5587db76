"""Bodies and headers of the admin routes."""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import asdict
from typing import Annotated, Any

from google.protobuf.field_mask_pb2 import FieldMask
from pydantic import ConfigDict, Field, field_validator
from softprompt_api.errors import AdapterInvalid, InvalidArgument
from softprompt_api.inference.v1.inference_pb2 import NearestTokensResponse
from softprompt_api.names import MAX_VERSION
from softprompt_api.quality import Norms, Probe
from softprompt_api.registry.v1.registry_pb2 import (
    AdapterVersion,
    ImportAdapterRequest,
    RegisterAdapterHeader,
    UpdateAdapterRequest,
)
from softprompt_api.rpc.quality import norms_from, probe_of, warnings_of
from starlette.datastructures import Headers

from softprompt_gateway.body import parse_object
from softprompt_gateway.catalog import spelling_of
from softprompt_gateway.errors import Refused
from softprompt_gateway.validation import RequestModel, at_most

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Told in the document, and checked by the registry.
_WORDS = {"type": "string", "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"}  # nothing that steers a terminal
_LABEL_KEYS: dict[str, Any] = {"propertyNames": _WORDS | {"minLength": 1, "maxLength": 64}}
_LABEL = _WORDS | {"maxLength": 256}
_LABELS = _LABEL_KEYS | {"additionalProperties": _LABEL}
_CHANGED_LABELS = _LABEL_KEYS | {"additionalProperties": {"anyOf": [_LABEL, {"type": "null"}]}}
_MAX_LABELS = 32
Name = Annotated[str, Field(max_length=128, json_schema_extra={"pattern": "^[a-z0-9][a-z0-9._-]*$"})]
Labels = Annotated[dict[str, str], Field(max_length=_MAX_LABELS, json_schema_extra=_LABELS), at_most(_MAX_LABELS)]
ChangedLabels = Annotated[
    dict[str, str | None], Field(max_length=_MAX_LABELS, json_schema_extra=_CHANGED_LABELS), at_most(_MAX_LABELS)
]
Key = Annotated[str, Field(max_length=128, json_schema_extra={"pattern": "^([!-~][ -~]*)?$"})]
Version = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class RegisterRequest(RequestModel):
    """Body of `POST /v1/adapters`: a whole adapter in JSON, for small ones."""

    name: Name
    config: str | dict[str, Any] = Field(description="PEFT's adapter_config.json, as an object or its text")
    tensors_base64: str = Field(
        description="adapter_model.safetensors in base64", json_schema_extra={"contentEncoding": "base64"}
    )
    sha256: Sha256 | None = Field(None, description="of the tensor file; checked where given")
    labels: Labels | None = None
    idempotency_key: Key | None = Field(
        None, description="the same key with the same content answers with the same version"
    )
    base_model: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="id of the base model the adapter is for; default: the one that is served"
    )

    @field_validator("config", mode="before")
    @classmethod
    def _object_or_text(cls, value: object) -> object:
        # Checked here because a union's own message would name types, not the field.
        if not isinstance(value, str | dict):
            raise InvalidArgument("config must be an object or a string", field="config")
        return value

    def tensors(self) -> bytes:
        """The tensor file, whose sha256 is the given one."""
        try:
            data = base64.b64decode(self.tensors_base64, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidArgument("tensors_base64 is not base64", field="tensors_base64") from None
        if self.sha256 is not None and hashlib.sha256(data).hexdigest() != self.sha256:
            raise AdapterInvalid("the tensors' sha256 is not the given one", field="sha256")
        return data

    def header(self, name: str, tensors: bytes) -> RegisterAdapterHeader:
        """The upload's header; `name` is the full one."""
        return RegisterAdapterHeader(
            name=name,
            config_json=self.config if isinstance(self.config, str) else json.dumps(self.config),
            tensors_size_bytes=len(tensors),
            tensors_sha256=hashlib.sha256(tensors).hexdigest(),
            idempotency_key=self.idempotency_key or "",
            labels=self.labels or {},
            base_model_id=self.base_model or "",
        )


class ImportRequest(RequestModel):
    """Body of `POST /v1/adapters` with `source`: an adapter whose files the registry reads itself."""

    name: Name
    source: str = Field(
        max_length=2048,
        description="hf://owner/name, hf://owner/name@revision or file:///folder, where allowed",
        json_schema_extra={"pattern": "^(hf|file)://"},
    )
    labels: Labels | None = None
    idempotency_key: Key | None = Field(
        None, description="the same key with the same content answers with the same version"
    )
    base_model: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="id of the base model the adapter is for; default: the one that is served"
    )

    def call(self) -> ImportAdapterRequest:
        """The registry's request, with the name that the caller knows the adapter by."""
        return ImportAdapterRequest(
            name=self.name,
            source=self.source,
            idempotency_key=self.idempotency_key or "",
            labels=self.labels or {},
            base_model_id=self.base_model or "",
        )


def parse_registration(values: dict[str, Any]) -> RegisterRequest | ImportRequest:
    """An adapter that comes whole, or one that has a `source`."""
    return (ImportRequest if "source" in values else RegisterRequest).checked(values)


class UploadLabels(RequestModel):
    """The header `x-adapter-labels`, decoded."""

    labels: Labels


class UpdateRequest(RequestModel):
    """Body of `PATCH /v1/adapters/{adapter}`: what is not in it stays as it is."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"labels": {"type": "object", "minProperties": 1}}, "required": ["labels"]},
                {"properties": {"pinned": {"type": "boolean"}}, "required": ["pinned"]},
            ]
        }
    )

    labels: ChangedLabels | None = Field(None, description="labels to set; null removes one, others stay")
    pinned: bool | None = Field(None, description="whether the version is kept from deletion")

    def call(self, adapter: str) -> UpdateAdapterRequest:
        """The registry's request."""
        labels = self.labels or {}
        paths = [f"labels.{key}" for key in labels] + ([] if self.pinned is None else ["pinned"])
        if not paths:
            raise Refused("give labels or pinned to change", code="missing_required_parameter", param="labels")
        return UpdateAdapterRequest(
            adapter=adapter,
            labels={key: value for key, value in labels.items() if value is not None},
            pinned=bool(self.pinned),
            update_mask=FieldMask(paths=paths),
        )


class AliasRequest(RequestModel):
    """Body of `PUT /v1/adapters/{adapter}/aliases/{alias}`."""

    version: Version = Field(description="the version that the alias shall point to")
    expected_version: Annotated[int, Field(ge=0, le=MAX_VERSION)] | None = Field(
        None, description="move it only from this version; 0: only make it new"
    )


def upload_header(name: str, headers: Headers, *, size_bytes: int) -> RegisterAdapterHeader:
    """The header of a raw upload, from HTTP headers; what is wrong is refused by the header's name."""
    sha256 = _required(headers, "x-adapter-sha256", "hex sha256 of the body")
    if not _SHA256.match(sha256):
        raise InvalidArgument("x-adapter-sha256 must be 64 lower-case hex digits", field="x-adapter-sha256")
    config = _from_base64(
        _required(headers, "x-adapter-config", "base64 of adapter_config.json"), "x-adapter-config"
    )
    labels: dict[str, str] = {}
    if "x-adapter-labels" in headers:
        decoded = parse_object(_from_base64(headers["x-adapter-labels"], "x-adapter-labels"))
        labels = UploadLabels.checked({"labels": decoded}).labels
    try:
        config_json = config.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidArgument("x-adapter-config is not UTF-8", field="x-adapter-config") from None
    return RegisterAdapterHeader(
        name=name,
        config_json=config_json,
        tensors_size_bytes=size_bytes,
        tensors_sha256=sha256,
        idempotency_key=headers.get("idempotency-key", "")[:129],
        labels=labels,
        base_model_id=headers.get("x-adapter-base-model", ""),
    )


def _required(headers: Headers, name: str, meaning: str) -> str:
    value = headers.get(name)
    if value is None:
        raise Refused(f"the header {name} is required: {meaning}", code="missing_required_parameter", param=name)
    return value


def _from_base64(value: str, name: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"the header {name} is not base64", field=name) from None


def adapter_json(version: AdapterVersion, *, with_config: bool = False) -> dict[str, Any]:
    """One version, as the admin routes show it."""
    shape: dict[str, Any] = {
        "object": "adapter",
        "id": version.id,
        "name": version.name,
        "version": version.version,
        "model": spelling_of(version),
        "digest": version.digest,
        "kind": version.kind,
        "num_virtual_tokens": version.num_virtual_tokens,
        "hidden_size": version.hidden_size,
        "num_tasks": version.num_tasks,
        "rank": version.rank,
        "dtype": version.dtype,
        "size_bytes": version.size_bytes,
        "sha256": version.tensors_sha256,
        "base_model": version.base_model.id or None,
        "row_norms": _norms_json(norms_from(version)),
        "vocabulary_norms": _norms_json(norms_from(version.base_model)),
        "probe": _probe_json(probe_of(version)),
        "warnings": warnings_of(version),
        "created_at": version.created_at.seconds,
        "labels": dict(version.labels),
        "pinned": version.pinned,
        "aliases": list(version.aliases),
    }
    if with_config:
        shape["config_json"] = version.config_json
    return shape


def _norms_json(norms: Norms | None) -> dict[str, float] | None:
    return asdict(norms) if norms else None


def _probe_json(probe: Probe | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    return {
        "base_model": probe.base_model_id,
        "dtype": probe.dtype,
        "probed_at": int(probe.probed_at.timestamp()) if probe.probed_at else None,
        "effects": [asdict(effect) for effect in probe.effects],
    }


def nearest_json(version: AdapterVersion, answer: NearestTokensResponse) -> dict[str, Any]:
    """The tokens nearest to each virtual token of a version, as the admin routes show them."""
    return {
        "object": "adapter.nearest_tokens",
        "model": spelling_of(version),
        "digest": answer.adapter_digest,
        "data": [
            {
                "index": index,
                "norm": virtual.norm,
                "tokens": [
                    {"token_id": near.token_id, "token": near.token, "cosine": near.cosine}
                    for near in virtual.nearest
                ],
            }
            for index, virtual in enumerate(answer.virtual_tokens)
        ],
    }
