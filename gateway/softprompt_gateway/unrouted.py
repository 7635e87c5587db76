"""What routing refuses, in words: methods, and paths that are nobody's, with the one that was meant."""

import difflib
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from fastapi import APIRouter
from softprompt_api.names import shown
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from softprompt_gateway.errors import Refused, describe

_BASE = "/v1"
# What clients of OpenAI and vLLM may ask for below it.
_NOT_SERVED = frozenset(
    {
        *("assistants", "audio", "batches", "chatkit", "classify", "containers", "conversations", "edits"),
        *("embeddings", "engines", "evals", "files", "fine-tunes", "fine_tuning", "images", "messages"),
        *("moderations", "organization", "pooling", "realtime", "rerank", "responses", "score", "skills"),
        *("threads", "uploads", "vector_stores", "videos"),
    }
)
_STORED = "chat/completions/"
# Whoever posts to these means no response of this id.
_NO_IDS = frozenset({f"{_BASE}/responses/input_tokens", f"{_BASE}/responses/compact"})
# A longer path is nobody's slip.
_MAX_HINTED = 256
_SHOWN = 128


def explainer(routers: Sequence[APIRouter]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """A handler of what routing itself refuses, over all routers of the app."""

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        every = itertools.chain(request.app.routes, *(router.routes for router in routers))
        routes = [route for route in every if isinstance(route, Route)]
        return describe(_refusal(request, error.status_code, routes)).response()

    return explain


def _refusal(request: Request, status: int, routes: Sequence[Route]) -> Refused:
    method, path = request.method, request.scope["path"]
    asked = shown(f"{method} {path}", _SHOWN)
    if status == 405 and not (method == "POST" and path in _NO_IDS):
        # One path can have several routes, and the router tells only the first one's methods.
        allow = ", ".join(sorted(_methods(routes, request)))
        message = f"{shown(method)} is not allowed here; {allow} is"
        return Refused(message, code="method_not_allowed", status=405, headers={"allow": allow})
    if status not in (404, 405):
        return Refused(f"there is no such route: {asked}", code="invalid_request", status=status)
    if path in _NO_IDS or (meant := _meant(path, routes)) is None:
        message = f"{asked} is not served here" if _is_not_served(path) else f"there is no such route: {asked}"
        return Refused(f"{message}; /docs shows those that there are", code="not_found", status=404)
    message = f"there is no such route: {asked}; did you mean {shown(meant, _SHOWN)}?"
    return Refused(message, code="not_found", status=404)


def _methods(routes: Iterable[Route], request: Request) -> set[str]:
    methods = {
        method
        for route in routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return methods | ({"HEAD"} if "GET" in methods else set())


def _meant(path: str, routes: Sequence[Route]) -> str | None:
    """The path of a route that this one stands for: /v1 is missing, or there twice, or a letter is wrong."""
    if len(path) > _MAX_HINTED:
        return None
    for near in _without_what_is_before(path):
        if any(route.path_regex.match(near) for route in routes):
            return near
    if _is_not_served(path):
        return None
    literal = [route.path for route in routes if "{" not in route.path]
    return next(iter(difflib.get_close_matches(path, literal, n=1, cutoff=0.8)), None)


def _without_what_is_before(path: str) -> Iterator[str]:
    """Every end of the path, the longest first, as it is and under /v1."""
    parts = [part for part in path.split("/") if part]
    for start in range(len(parts)):
        end = "/" + "/".join(parts[start:])
        yield from (end, _BASE + end)


def _is_not_served(path: str) -> bool:
    """Whether this is OpenAI's or vLLM's, and not ours; /v1 may be missing, or there twice."""
    below = path.rpartition(f"{_BASE}/")[2].lstrip("/")
    return below.partition("/")[0] in _NOT_SERVED or below.startswith(_STORED)
