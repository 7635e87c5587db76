"""API keys, which do not change once they are made: what one may say, and its record in the store."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from softprompt_api.access import Scope
from softprompt_api.errors import DataCorrupted, InvalidArgument
from softprompt_api.names import check_name, shown
from softprompt_api.tenants import check_tenant

MAX_ADAPTERS = 256
MAX_NAME_CHARACTERS = 128
SHA256_PATTERN = re.compile(r"[0-9a-f]{64}\Z")
_ID_PREFIX = "key-"
_ID_DIGITS = 12
_ID = re.compile(rf"{_ID_PREFIX}([0-9a-f]{{{_ID_DIGITS}}})\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What one key may take; 0: no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    parallel_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDraft:
    """What a key shall allow; fields as in the protocol."""

    tenant: str
    name: str = ""
    scopes: tuple[Scope, ...]
    adapters: tuple[str, ...] = ()
    limits: KeyLimits = field(default_factory=KeyLimits)
    expires_at: datetime | None = None

    def check(self, now: datetime) -> None:
        """Raise InvalidArgument, naming the field, for what no key can be."""
        check_tenant(self.tenant)
        if len(self.name) > MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise InvalidArgument(f"name has at most {MAX_NAME_CHARACTERS} printable characters", field="name")
        if not self.scopes:
            raise InvalidArgument(f"scopes must name at least one of {', '.join(Scope)}", field="scopes")
        if len(self.adapters) > MAX_ADAPTERS:
            raise InvalidArgument(f"a key names at most {MAX_ADAPTERS} adapters, or none: all", field="adapters")
        for adapter in self.adapters:
            check_name(adapter, field="adapters")
        for limit, value in asdict(self.limits).items():
            if value < 0:
                raise InvalidArgument(f"limits.{limit} cannot be negative", field=f"limits.{limit}")
        if self.expires_at is not None and self.expires_at <= now:
            raise InvalidArgument("expires_at must lie in the future", field="expires_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey(KeyDraft):
    """A key that was made: everything but its text."""

    sha256: str
    created_at: datetime

    @property
    def id(self) -> str:
        """What people call it by."""
        return key_id(self.sha256)


def key_id(sha256: str) -> str:
    """A key's id: enough of its sha256 to tell it from others."""
    return _ID_PREFIX + sha256[:_ID_DIGITS]


def id_digits(id_: str) -> str:
    """The beginning of the sha256 that an id tells; InvalidArgument for what is no id."""
    match = _ID.match(id_)
    if match is None:
        raise InvalidArgument(
            f"{shown(id_)} is not a key's id, {_ID_PREFIX} and {_ID_DIGITS} hex digits", field="id"
        )
    return match[1]


def encode_key(key: ApiKey) -> Mapping[Any, Any]:
    """The hash fields of a key, with the sha256 that a damaged record is found out by."""
    record = json.dumps(
        {
            "tenant": key.tenant,
            "name": key.name,
            "scopes": key.scopes,
            "adapters": key.adapters,
            "limits": asdict(key.limits),
            "created_at": key.created_at.isoformat(),
            "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        }
    )
    return {"record": record, "check": _check(key.sha256, record)}


def decode_key(fields: Mapping[bytes, bytes], *, sha256: str) -> ApiKey:
    """A key from its hash; DataCorrupted unless it is a whole record of this very key."""
    try:
        record = fields[b"record"].decode()
        if fields[b"check"].decode() != _check(sha256, record):
            raise ValueError("the record is not what was written")
        stored = json.loads(record)
        return ApiKey(
            sha256=sha256,
            tenant=stored["tenant"],
            name=stored["name"],
            scopes=tuple(Scope(scope) for scope in stored["scopes"]),
            adapters=tuple(stored["adapters"]),
            limits=KeyLimits(**stored["limits"]),
            created_at=datetime.fromisoformat(stored["created_at"]),
            expires_at=datetime.fromisoformat(stored["expires_at"]) if stored["expires_at"] else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataCorrupted(f"the stored API key {key_id(sha256)} cannot be read") from error


def made_now(draft: KeyDraft, *, sha256: str) -> ApiKey:
    """The key that a draft becomes; InvalidArgument where it cannot."""
    now = datetime.now(UTC)
    draft.check(now)
    return ApiKey(
        sha256=sha256,
        tenant=draft.tenant,
        name=draft.name,
        scopes=tuple(dict.fromkeys(draft.scopes)),
        adapters=tuple(dict.fromkeys(draft.adapters)),
        limits=draft.limits,
        created_at=now,
        expires_at=draft.expires_at,
    )


def _check(sha256: str, record: str) -> str:
    return hashlib.sha256(f"{sha256} {record}".encode()).hexdigest()
