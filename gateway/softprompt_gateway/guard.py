"""Who may call which route: an API key in `Authorization: Bearer`, asked for by the route itself.

A route's class says which scope it needs. There is no route without such a class: none is open by being forgotten.
"""

import asyncio
import hmac
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar, cast
from urllib.parse import urlsplit

from fastapi.routing import APIRoute
from softprompt_api.access import Scope, key_sha256, scope_from
from softprompt_api.errors import PermissionDenied, SoftpromptError, Unauthenticated, Unavailable
from softprompt_api.names import shown
from softprompt_api.registry.v1.registry_pb2 import ApiKey, ListKeysRequest
from softprompt_api.settings import is_loopback
from starlette.datastructures import MutableHeaders
from starlette.routing import Match
from starlette.types import Message, Receive, Send
from starlette.types import Scope as RequestScope

from softprompt_gateway.caller import ANYBODY, Caller
from softprompt_gateway.clients import RegistryClient
from softprompt_gateway.cors import no_pages_of
from softprompt_gateway.errors import Refused
from softprompt_gateway.keyring import Keyring
from softprompt_gateway.rates import Limiter, Meter
from softprompt_gateway.settings import Settings, SettingsError

_BEARER = re.compile(rb"(?i:bearer) +([\x21-\x7e]{1,256})\Z")


class Guard:
    """Tells who calls.

    A key is asked for once the registry has ever made one, at once with `require_keys` or beyond this machine, and
    never with `insecure`. Keys that the registry told of are known without asking it. One that is not known is
    asked for, since its first request may be faster than the news of it.
    """

    def __init__(self, settings: Settings, registry: RegistryClient, keyring: Keyring) -> None:
        self._is_open = settings.insecure
        self._is_local = is_loopback(settings.host) and not settings.insecure
        self._origins = settings.origins
        self._always_asks = settings.always_asks_for_keys
        self._timeout_s = settings.registry_timeout_s
        self._registry = registry
        self._keyring = keyring

    async def caller(self, headers: list[tuple[bytes, bytes]], wanted: Scope) -> Caller:
        """Whoever sends these headers to a route that wants this scope.

        Unauthenticated: no key, or none that is known. Unavailable: keys cannot be checked.
        """
        if self._is_open:
            return self._anybody(headers, wanted)
        sent = _bearer(headers) if self._always_asks else b""
        if not self._keyring.is_listed:
            await self._wait_for_keys()
        if not self._always_asks:
            if not self._keyring.was_any_made:
                return self._anybody(headers, wanted)
            sent = _bearer(headers)
        self._keyring.check_heard()
        return await self._known(sent.decode("ascii"))

    async def _wait_for_keys(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._keyring.wait_until_listed()
        except TimeoutError:
            raise Unavailable("API keys cannot be checked: the registry does not answer; try again") from None

    def _anybody(self, headers: list[tuple[bytes, bytes]], wanted: Scope) -> Caller:
        """Who needs no key; PermissionDenied for web pages of others, which a browser lets send requests too.

        A page tells where it comes from, unless its name was made to stand for this machine: then the request does
        not name this machine as those do who mean it.
        """
        host, origin = _text_of(headers, b"host"), _text_of(headers, b"origin")
        if self._is_local and host and not _is_this_machine(f"//{host}"):
            raise PermissionDenied(
                f"this server asks for no API key, and answers to names of this machine alone, not {shown(host)}; "
                "to serve others, make a key, or set insecure"
            )
        if origin and origin.partition("://")[2] != host and not self._lets_in(origin, wanted):
            but = ", for which `*` is not enough" if self._origins.any else ""
            raise PermissionDenied(f"this server asks for no API key: {no_pages_of(origin)}{but}")
        return ANYBODY

    def _lets_in(self, origin: str, wanted: Scope) -> bool:
        """Whether pages of an origin need no key.

        `*` is for those that have one: whoever looks at any page would lend it this server otherwise. With
        `insecure` it lets all pages ask the models, and still none that is not named administer the server.
        """
        if _is_this_machine(origin) or origin in self._origins.named:
            return True
        return self._is_open and self._origins.any and wanted is Scope.INFER

    async def _known(self, text: str) -> Caller:
        sha256 = key_sha256(text)
        key = self._keyring.find(sha256) or await self._registry.find_key(sha256)
        # The lookup itself compares hashes, from which no timing leads back to a key.
        if key is None or not hmac.compare_digest(key.sha256, sha256) or _has_expired(key):
            raise Unauthenticated("this API key is not known, was revoked, or has expired")
        scopes = frozenset(scope for value in key.scopes if (scope := scope_from(value)) is not None)
        return Caller.with_key(key, scopes)


def _text_of(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


@lru_cache(maxsize=64)  # a name may be as long as all headers
def _is_this_machine(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return is_loopback(host) or host.endswith(".localhost")


def _has_expired(key: ApiKey) -> bool:
    return key.HasField("expires_at") and key.expires_at.seconds <= time.time()


def _bearer(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The key that was sent; Refused for two of them, Unauthenticated for none or an odd one."""
    sent = [value for name, value in headers if name == b"authorization"]
    if len(sent) > 1:
        raise Refused("authorization stands twice in the headers", code="invalid_http")
    if not sent:
        raise Unauthenticated("an API key is needed: send it as `Authorization: Bearer …`")
    match = _BEARER.match(sent[0])
    if match is None:
        raise Unauthenticated("the authorization header is not `Bearer` and an API key")
    return match[1]


async def refuse_without_keys(settings: Settings, registry: RegistryClient) -> None:
    """Raise SettingsError where others than this machine can ask, and there is no key to ask them for.

    Where the registry does not answer, nobody is let in before it does.
    """
    if settings.require_keys or not settings.always_asks_for_keys:
        return
    try:
        page = await registry.list_keys(ListKeysRequest(page_size=1))
    except SoftpromptError:
        return
    if not page.ever_made:
        raise SettingsError(
            f"{settings.host} is reachable from other machines, and there is no API key yet: make one with "
            "`softprompt key create --scopes admin`, or set require_keys, or insecure to serve everybody"
        )


class GuardedRoute(APIRoute):
    """A route that lets in who may call it; `guarded` makes one that does. HEAD is answered as GET."""

    guard: ClassVar[Guard]
    limiter: ClassVar[Limiter]
    wanted: ClassVar[Scope | None]

    def matches(self, scope: RequestScope) -> tuple[Match, RequestScope]:
        """Whether a request is this route's."""
        return super().matches(_as_get(scope))

    async def handle(self, scope: RequestScope, receive: Receive, send: Send) -> None:
        """Answer a request whose path is this route's."""
        if self.wanted is None:
            await super().handle(_as_get(scope), receive, send)
            return
        caller = await self.guard.caller(scope["headers"], self.wanted)
        caller.enter(scope)
        caller.check_scope(self.wanted)
        async with self.limiter.admitted(caller, Meter.new(scope)) as headers:
            await super().handle(_as_get(scope), receive, _with(headers, send) if headers else send)


def guarded(
    guard: Guard, limiter: Limiter, wanted: Scope | None, kind: type[GuardedRoute] = GuardedRoute
) -> type[GuardedRoute]:
    """The class of routes that need a scope (None: they are open), over another class of routes."""
    members = {"guard": guard, "limiter": limiter, "wanted": wanted}
    return cast(type[GuardedRoute], type(kind.__name__, (kind,), members))


def _as_get(scope: RequestScope) -> RequestScope:
    """A request as a route sees it: of an answer to HEAD the server sends no body."""
    return {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope


def _with(headers: Mapping[str, str], send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return send_with_headers
