"""Who asks: a tenant, by one of its API keys, and what that key may."""

from dataclasses import dataclass, field, replace

from softprompt_api.access import Scope, allows
from softprompt_api.errors import AdapterNotFound, PermissionDenied
from softprompt_api.names import AdapterRef, check_name, shown
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion, ApiKey, KeyLimits
from softprompt_api.tenants import DEFAULT_TENANT, full_name, local_name, tenant_of
from starlette.requests import Request
from starlette.types import Scope as RequestScope

_STATE = "caller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks.

    Attributes:
        key_id: the key's id; "": no key is asked for.
        adapters: names of the tenant's adapters that the key may use; empty: all.
    """

    tenant: str = DEFAULT_TENANT
    key_id: str = ""
    scopes: frozenset[Scope] = frozenset()
    adapters: frozenset[str] = frozenset()
    limits: KeyLimits = field(default_factory=KeyLimits, hash=False)

    @classmethod
    def of(cls, request: Request) -> "Caller":
        """Whoever asks this; the route has let them in."""
        caller = cls.of_scope(request.scope)
        assert caller is not None, "the route is open"
        return caller

    @classmethod
    def of_scope(cls, scope: RequestScope) -> "Caller | None":
        """Whoever asks, as far as their key was looked at."""
        caller: Caller | None = scope["state"].get(_STATE)
        return caller

    @classmethod
    def with_key(cls, key: ApiKey, scopes: frozenset[Scope]) -> "Caller":
        """Whoever has this key."""
        return cls(
            tenant=key.tenant,
            key_id=key.id,
            scopes=scopes,
            adapters=frozenset(key.adapters),
            limits=key.limits,
        )

    def enter(self, scope: RequestScope) -> None:
        """Be known to a request's route, and to its log line."""
        scope["state"][_STATE] = self

    def check_scope(self, wanted: Scope) -> None:
        """PermissionDenied unless the key allows it."""
        if not allows(self.scopes, wanted):
            raise PermissionDenied(f"this API key has not the scope {wanted}")

    def owns(self, name: str) -> bool:
        """Whether an adapter, by its full name, is the tenant's."""
        return tenant_of(name) == self.tenant

    def may_use(self, name: str) -> bool:
        """Whether the key may use an adapter, by its full name."""
        return self.owns(name) and (not self.adapters or local_name(name) in self.adapters)

    def check_use(self, name: str) -> None:
        """PermissionDenied for an adapter of the tenant, by its full name, that the key may not use."""
        if not self.may_use(name):
            raise PermissionDenied(f"this API key may not use the adapter {shown(local_name(name))}")

    def own(self, ref: AdapterRef) -> AdapterRef:
        """What the caller's spelling stands for across all tenants.

        Raises AdapterNotFound where it spells another tenant's, and PermissionDenied where the key may not use it.
        """
        if ref.owner or "/" in ref.name:
            raise AdapterNotFound(f"there is no adapter {shown(str(ref.whole))}", field="adapter")
        if ref.digest:
            return replace(ref, owner=self.tenant)
        name = full_name(self.tenant, ref.name)
        self.check_use(name)
        return ref if name == ref.name else replace(ref, name=name)

    def new_name(self, name: str) -> str:
        """The full name of an adapter that the caller registers as `name`."""
        full = full_name(self.tenant, check_name(name))
        self.check_use(full)
        return full

    def told(self, version: AdapterVersion) -> AdapterVersion:
        """A version of the tenant's, by the name that the tenant knows it by."""
        if self.tenant == DEFAULT_TENANT:
            return version
        told = AdapterVersion()
        told.CopyFrom(version)
        told.name = local_name(version.name)
        return told

    def salt(self, asked: str | None) -> str:
        """What keeps a request's KV apart: the tenant, and within it what the request asks for."""
        if self.tenant == DEFAULT_TENANT and not asked:
            return ""
        return f"{self.tenant}/{asked or ''}"

    def facts(self) -> dict[str, str]:
        """Who it is, for the log."""
        return {"key": self.key_id, "tenant": self.tenant} if self.key_id else {}


ANYBODY = Caller(scopes=frozenset(Scope))
