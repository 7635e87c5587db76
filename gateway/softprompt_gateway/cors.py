"""Web pages of other origins: which ones a browser may let in (CORS), by Starlette's middleware."""

import re
from dataclasses import dataclass
from typing import Self

from softprompt_api.names import shown
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from softprompt_gateway.errors import Refused, describe

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+", re.ASCII)
_NOT_IN_ORIGINS = frozenset("*/\\?#@")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# What a page's script can read beside what browsers always show it.
EXPOSED_HEADERS = (
    "x-request-id",
    "x-softprompt-adapter",
    "x-softprompt-adapter-digest",
    *(f"x-ratelimit-{kind}-{unit}" for unit in ("requests", "tokens") for kind in ("limit", "remaining", "reset")),
    "retry-after",
    "retry-after-ms",
    "www-authenticate",
    "allow",
)


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins whose web pages are let in.

    Attributes:
        named: as browsers send them.
        any: all others too, as far as they bring an API key.
    """

    named: frozenset[str] = frozenset()
    any: bool = False

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Origins joined by commas, or `*`; ValueError for what no browser would send."""
        parts = [part for part in map(str.strip, (text or "").split(",")) if part]
        return cls(named=frozenset(_checked(part) for part in parts if part != ANY), any=ANY in parts)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.any or bool(self.named)


def _checked(text: str) -> str:
    if text == "null":
        raise ValueError("'null' is the origin of every file and sandboxed page; serve the page over HTTP")
    scheme, _, place = text.partition("://")
    if not _ORIGIN.fullmatch(text.lower()) or _NOT_IN_ORIGINS & set(place):
        raise ValueError(f"{shown(text)} is neither scheme://host, scheme://host:port, nor *")
    if (sent := _as_sent(scheme, place)) != text:
        raise ValueError(f"{shown(text)} is sent by browsers as {shown(sent)}")
    return text


def _as_sent(scheme: str, place: str) -> str:
    default_port = {"http": ":80", "https": ":443"}.get(scheme.lower(), "")
    return f"{scheme}://{place.removesuffix(default_port)}".lower()


class _Cors(CORSMiddleware):
    """The rules. Scripts send their keys themselves: what a browser would add, as cookies, is not asked for."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        super().__init__(
            app,
            allow_origins=(ANY,) if origins.any else origins.named,
            allow_methods=_METHODS,
            allow_headers=(ANY,),
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )


class Preflights(_Cors):
    """What a browser asks before a request, without a key: inside the edge, which gives it an id and logs it."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Starlette's answer, and its refusals in the shape of other errors."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        if self.is_allowed_origin(origin):
            refused = Refused(f"{shown(method)} is not allowed", code="method_not_allowed", status=405)
        else:
            refused = Refused(no_pages_of(origin), code="permission_denied", status=403)
        return describe(refused).response()

    async def simple_response(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        request_headers: Headers,  # noqa: ARG002
    ) -> None:
        """What is no preflight, without change."""
        await self.app(scope, receive, send)


class CorsHeaders(_Cors):
    """Outside the edge, whose errors have them too: headers that let a page read an answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with the headers where the origin is one of those let in."""
        if scope["type"] == "http":
            await self.simple_response(scope, receive, send, request_headers=Headers(scope=scope))
        else:
            await self.app(scope, receive, send)


def no_pages_of(origin: str) -> str:
    """Why a page is not let in, and what would change that."""
    return f"web pages of {shown(origin)} are let in where allowed_origins (--allowed-origins) names that origin"
