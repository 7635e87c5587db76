"""`/docs`: Swagger UI over the OpenAPI document, a page that loads nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PATH = "/docs"
# Of this package only the files are used, which are those that Swagger UI's authors publish.
_PACKAGE, _FOLDER = "fastapi-offline", "fastapi_offline/static"
_SCRIPT, _STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
_TYPES = {_SCRIPT: "text/javascript", _STYLE: "text/css"}
# Its validator would be asked at swagger.io.
_START = """
SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, showExtensions: true, showCommonExtensions: true,
  validatorUrl: null,
});
"""
# Addresses are relative: a proxy may serve all of this below a path of its own.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Softprompt: HTTP API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/{style}">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/{script}"></script>
<script>{start}</script>
</body>
</html>
"""


def docs_routes() -> list[Route]:
    """The page, and the files that it loads, read now."""
    files = {name: _read(name) for name in _TYPES}
    # A file of another version has another address.
    script, style = (f"{name}?{hashlib.sha256(files[name]).hexdigest()[:16]}" for name in (_SCRIPT, _STYLE))
    page = _PAGE.format(script=script, style=style, start=_START).encode()
    headers = {"cache-control": "no-cache", "content-security-policy": _policy()}
    kept = {"cache-control": "public, max-age=31536000, immutable"}
    return [
        _route(_PATH, page, "text/html", headers),
        *(_route(f"{_PATH}/{name}", files[name], type_, kept) for name, type_ in _TYPES.items()),
    ]


def _read(name: str) -> bytes:
    return Path(str(distribution(_PACKAGE).locate_file(f"{_FOLDER}/{name}"))).read_bytes()


def _policy() -> str:
    """What browsers let the page load: nothing from elsewhere."""
    start = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' 'sha256-{start}'",
            "style-src 'self' 'unsafe-inline'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _route(path: str, content: bytes, media_type: str, headers: Mapping[str, str]) -> Route:
    async def answer(_request: Request) -> Response:
        told = {"x-content-type-options": "nosniff", **headers}
        return Response(content, headers=told, media_type=media_type)

    return Route(path, answer, methods=["GET"])
