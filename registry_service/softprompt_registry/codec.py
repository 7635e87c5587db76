"""Versions and base models to what the store holds, and back.

A version's record carries the sha256 of its own fields: one that was changed by anything but a writer of ours is
found out, and never taken for a version.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields as fields_of
from datetime import datetime
from functools import lru_cache
from typing import Any

from softprompt_api.errors import DataCorrupted
from softprompt_api.quality import Effect, Norms, Probe

from softprompt_registry.catalog import AdapterVersion, BaseModel

_INTEGERS = ("version", "id", "num_virtual_tokens", "hidden_size", "size_bytes")
# Of later versions of this program; what was stored before has none.
_LATER_INTEGERS = ("num_tasks", "rank")
_BASE_MODEL_FIELDS = tuple(field.name for field in fields_of(BaseModel))
_TEXTS = ("name", "digest", "kind", "dtype", "tensors_sha256", "config_json")


def encode_version(version: AdapterVersion) -> Mapping[Any, Any]:
    """The hash fields of a version."""
    fields = {name: str(getattr(version, name)) for name in (*_INTEGERS, *_LATER_INTEGERS, *_TEXTS)}
    fields["base_model"] = encode_base_model(version.base_model)
    fields["labels"] = json.dumps(dict(version.labels), sort_keys=True)
    fields["row_norms"] = _encode_norms(version.row_norms)
    fields["warnings"] = json.dumps(version.warnings)
    fields["probe"] = _encode_probe(version.probe)
    fields["pinned"] = str(int(version.pinned))
    fields["created_at"] = version.created_at.isoformat()
    return {**fields, "sha256": _sha256(fields)}


def decode_version(fields: Mapping[bytes, bytes], *, version_id: int) -> AdapterVersion:
    """A version from its hash; DataCorrupted unless it is a whole version with this very id."""
    try:
        texts: dict[str, Any] = {key.decode(): value.decode() for key, value in fields.items()}
        # Records of earlier versions of this software have none, and no pin.
        if texts.pop("sha256", None) not in (None, _sha256(texts)):
            raise ValueError("the record is not what was written")
        numbers: Mapping[str, Any] = {
            **{name: int(texts[name]) for name in _INTEGERS},
            **{name: int(texts.get(name, "0")) for name in _LATER_INTEGERS},
        }
        version = AdapterVersion(
            **{name: texts[name] for name in _TEXTS},
            **numbers,
            base_model=decode_base_model(texts["base_model"]),
            labels=json.loads(texts["labels"]),
            row_norms=_decode_norms(texts.get("row_norms", "null")),
            warnings=tuple(json.loads(texts.get("warnings", "[]"))),
            probe=_decode_probe(texts.get("probe", "null")),
            pinned=bool(int(texts.get("pinned", "0"))),
            created_at=datetime.fromisoformat(texts["created_at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataCorrupted(f"the stored version with id {version_id} cannot be read") from error
    if version.id != version_id:
        raise DataCorrupted(f"the store answered with version id {version.id} for {version_id}")
    return version


def _sha256(fields: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _encode_norms(norms: Norms | None) -> str:
    return json.dumps(asdict(norms) if norms else None, sort_keys=True)


def _decode_norms(text: str) -> Norms | None:
    values = json.loads(text)
    return Norms(**values) if values else None


def _encode_probe(probe: Probe | None) -> str:
    if probe is None:
        return "null"
    assert probe.probed_at is not None
    return json.dumps({**asdict(probe), "probed_at": probe.probed_at.isoformat()}, sort_keys=True)


def _decode_probe(text: str) -> Probe | None:
    values = json.loads(text)
    if values is None:
        return None
    effects = tuple(Effect(**effect) for effect in values.pop("effects"))
    probed_at = datetime.fromisoformat(values.pop("probed_at"))
    return Probe(**values, effects=effects, probed_at=probed_at)


def encode_base_model(model: BaseModel) -> str:
    """A base model as JSON."""
    return json.dumps(asdict(model), sort_keys=True)


@lru_cache(maxsize=64)  # nearly every version has the same few
def decode_base_model(text: str | bytes) -> BaseModel:
    """A base model from its JSON, without what only other versions of this software know of it."""
    stored = json.loads(text)
    values = {name: stored[name] for name in _BASE_MODEL_FIELDS if name in stored}
    norms = values.pop("vocabulary_norms", None)
    return BaseModel(**values, vocabulary_norms=Norms(**norms) if norms else None)
