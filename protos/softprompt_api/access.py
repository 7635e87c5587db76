"""API keys as all services know them: what they look like, what is kept of them, and what they allow."""

import hashlib
import secrets
from collections.abc import Iterable
from enum import StrEnum

from softprompt_api.registry.v1 import registry_pb2 as pb

_PREFIX = "sk-sp-"
_SECRET_BYTES = 32


class Scope(StrEnum):
    """Something that a key allows; see KeyScope in the protocol."""

    INFER = "infer"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    ADMIN = "admin"


_INCLUDED_IN = {
    Scope.INFER: {Scope.INFER, Scope.ADMIN},
    Scope.ADAPTERS_READ: {Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.ADMIN},
    Scope.ADAPTERS_WRITE: {Scope.ADAPTERS_WRITE, Scope.ADMIN},
    Scope.ADMIN: {Scope.ADMIN},
}


def allows(scopes: Iterable[Scope], wanted: Scope) -> bool:
    """Whether what a key allows includes something."""
    return not _INCLUDED_IN[wanted].isdisjoint(scopes)


def new_key() -> str:
    """The text of a key that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def key_sha256(key: str) -> str:
    """What is kept of a key's text: no salt or slow hash is needed for 256 random bits."""
    return hashlib.sha256(key.encode()).hexdigest()


def scope_to(scope: Scope) -> "pb.KeyScope.ValueType":
    """A scope on the wire."""
    return pb.KeyScope.Value(f"KEY_SCOPE_{scope.name}")


def scope_from(value: "pb.KeyScope.ValueType") -> Scope | None:
    """A scope from the wire; None for one that this version does not know."""
    if value not in pb.KeyScope.values():
        return None
    return Scope.__members__.get(pb.KeyScope.Name(value).removeprefix("KEY_SCOPE_"))
