"""API keys from Python: made, listed and revoked at the registry."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from softprompt_api.access import Scope, scope_from, scope_to
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import KeyServiceStub
from softprompt_api.rpc.tls import ClientTls
from softprompt_api.tenants import DEFAULT_TENANT

from softprompt.calls import ServiceClient
from softprompt.registry import DEFAULT_ADDRESS

_CALL_TIMEOUT_S = 20.0
_PAGE_SIZE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyInfo:
    """What is kept of an API key: everything but its text.

    Attributes:
        id: what it is revoked by.
        tenant: whom it belongs to.
        scopes: what it allows: `infer`, `adapters:read`, `adapters:write`, `admin`.
        adapters: the tenant's adapters that it may use; empty: all.
        requests_per_minute, tokens_per_minute, parallel_requests: what it may take; 0: no limit.
        created_at, expires_at: ISO 8601, UTC; `expires_at` is "" for a key that does not end.
        name: what people call it.
    """

    id: str
    tenant: str
    scopes: tuple[str, ...]
    adapters: tuple[str, ...]
    requests_per_minute: int
    tokens_per_minute: int
    parallel_requests: int
    created_at: str
    expires_at: str
    name: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "scopes": list(self.scopes), "adapters": list(self.adapters)}


class KeyClient(ServiceClient):
    """A connection to a registry's keys; close it, or use it in a `with`.

    Every failed call raises an error of `softprompt_api.errors`.

    Args:
        address: `host:port` of the registry's gRPC.
        tls: how it is called; None: without TLS.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tls: ClientTls | None = None) -> None:
        super().__init__("registry", address, tls)
        self._stub = KeyServiceStub(self._channel)

    def create(
        self,
        scopes: Sequence[Scope],
        *,
        tenant: str = DEFAULT_TENANT,
        name: str = "",
        adapters: Sequence[str] = (),
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        parallel_requests: int = 0,
        expires_at: datetime | None = None,
    ) -> tuple[str, KeyInfo]:
        """A new key's text, which nobody can be told again, and what is kept of it."""
        request = pb.CreateKeyRequest(
            tenant=tenant,
            name=name,
            scopes=[scope_to(scope) for scope in scopes],
            adapters=adapters,
            limits=pb.KeyLimits(
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                parallel_requests=parallel_requests,
            ),
        )
        if expires_at is not None:
            request.expires_at.FromDatetime(expires_at)
        with self._translated():
            answer = self._stub.CreateKey(request, timeout=_CALL_TIMEOUT_S)
        return answer.key, _info(answer.api_key)

    def was_any_made(self) -> bool:
        """Whether there was ever a key: from the first on, every request needs one."""
        with self._translated():
            return self._stub.ListKeys(pb.ListKeysRequest(page_size=1), timeout=_CALL_TIMEOUT_S).ever_made

    def keys(self) -> list[KeyInfo]:
        """Every key that is not revoked, in order of ids."""
        infos, token = [], ""
        while True:
            request = pb.ListKeysRequest(page_size=_PAGE_SIZE, page_token=token)
            with self._translated():
                page = self._stub.ListKeys(request, timeout=_CALL_TIMEOUT_S)
            infos += [_info(key) for key in page.api_keys]
            token = page.next_page_token
            if not token:
                return infos

    def revoke(self, id_: str) -> None:
        """Delete a key; gateways refuse it at once."""
        with self._translated():
            self._stub.RevokeKey(pb.RevokeKeyRequest(id=id_), timeout=_CALL_TIMEOUT_S)


def _info(key: pb.ApiKey) -> KeyInfo:
    def told(name: Literal["created_at", "expires_at"]) -> str:
        return (
            getattr(key, name).ToDatetime(tzinfo=UTC).isoformat(timespec="seconds") if key.HasField(name) else ""
        )

    return KeyInfo(
        id=key.id,
        tenant=key.tenant,
        scopes=tuple(scope.value for value in key.scopes if (scope := scope_from(value)) is not None),
        adapters=tuple(key.adapters),
        requests_per_minute=key.limits.requests_per_minute,
        tokens_per_minute=key.limits.tokens_per_minute,
        parallel_requests=key.limits.parallel_requests,
        created_at=told("created_at"),
        expires_at=told("expires_at"),
        name=key.name,
    )
