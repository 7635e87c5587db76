"""`/docs`: a page that works without a network."""

import base64
import hashlib
import re
from typing import Any

import pytest

# As swagger-ui-dist 5.32.6 has them.
FILES = {
    "/docs/swagger-ui-bundle.js": (
        "text/javascript; charset=utf-8",
        "4b5a9b35a1adf37f00d39c0bae23cdb37007e2946240ef035137cc85b4d55349",
    ),
    "/docs/swagger-ui.css": (
        "text/css; charset=utf-8",
        "ca238f7d7c2cf4480c1e77a9c3b9da915ab216e96ffd354e69076560c650c6de",
    ),
}


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    return {"require_keys": True}


async def test_the_page_loads_files_of_this_server_alone(stack: Any) -> None:
    page = await stack.http.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["cache-control"] == "no-cache"
    assert "//" not in page.text
    loaded = [page.url.join(address) for address in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page.text)]
    assert {url.path for url in loaded} == FILES.keys()
    for url in loaded:
        # Kept for ever under an address that changes with them.
        assert FILES[url.path][1].startswith(url.query.decode())
        assert len(url.query) == 16
        assert (await stack.http.get(url)).status_code == 200
    assert page.url.join(re.findall(r'url: "([^"]+)"', page.text)[0]).path == "/openapi.json"
    assert "validatorUrl: null" in page.text  # or its address would be told to swagger.io


async def test_browsers_are_told_to_load_nothing_from_elsewhere(stack: Any) -> None:
    page = await stack.http.get("/docs")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    [script] = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.pop("script-src") == f"'self' 'sha256-{sha256}'"
    assert policy.pop("style-src") == "'self' 'unsafe-inline'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }


@pytest.mark.parametrize("path", FILES)
async def test_its_files_are_those_that_swagger_ui_publishes(stack: Any, path: str) -> None:
    got, head = await stack.http.get(path), await stack.http.head(path)
    media_type, sha256 = FILES[path]
    assert hashlib.sha256(got.content).hexdigest() == sha256
    assert head.content == b""
    for answer in (got, head):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media_type
        assert answer.headers["content-length"] == str(len(got.content))
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs/", "/docs/x", "/docs/oauth2-redirect", "/docs/..%2fcore.py", "/redoc"])
async def test_nothing_else_of_the_package_is_served(stack: Any, path: str) -> None:
    assert (await stack.http.get(path)).status_code == 404
