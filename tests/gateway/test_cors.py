"""Web pages of other origins: what browsers are told, and what may stand in the setting."""

from typing import Any

import pytest
from softprompt_api.access import Scope
from softprompt_api.registry.v1.registry_pb2 import KeyLimits
from softprompt_gateway.cors import Origins

APP = "https://app.example"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
READ = {"x-request-id", "x-softprompt-adapter", "x-softprompt-adapter-digest", "retry-after", "retry-after-ms"}


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    return {"allowed_origins": f"{APP}, http://localhost:5173", "require_keys": True, "max_body_bytes": 1024}


def bearer(key: str, origin: str = APP) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", "origin": origin}


async def preflight(stack: Any, origin: str, path: str = "/v1/chat/completions", **headers: str) -> Any:
    return await stack.http.request("OPTIONS", path, headers={"origin": origin} | ASKS | headers)


@pytest.mark.parametrize("origin", [APP, "http://localhost:5173"])
async def test_a_preflight_is_answered_before_a_key_is_asked_for(
    stack: Any, origin: str, logged: list[Any]
) -> None:
    for path in ("/v1/chat/completions", "/v1/adapters/loud", "/metrics", "/nothing"):
        answer = await preflight(stack, origin, path)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
        methods = answer.headers["access-control-allow-methods"].split(", ")
        assert {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} == set(methods)
        assert "access-control-allow-credentials" not in answer.headers
        assert answer.headers["x-request-id"]
    assert [(line["method"], line["status"]) for line in logged if line["event"] == "request"] == [
        ("OPTIONS", 200)
    ] * 4


async def test_a_page_may_reach_into_the_private_network(stack: Any) -> None:
    asks = {"access-control-request-private-network": "true"}
    answer = await preflight(stack, APP, **asks)
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert (await preflight(stack, "https://evil.example", **asks)).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{APP}:8443", f"{APP}.evil.example"])
async def test_a_preflight_of_another_origin_is_refused_and_told_of_the_setting(stack: Any, origin: str) -> None:
    answer = await preflight(stack, origin)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert "allowed_origins (--allowed-origins)" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


async def test_a_preflight_for_a_method_that_no_route_has_is_refused(stack: Any) -> None:
    answer = await preflight(stack, APP, **{"access-control-request-method": "BREW"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_options_that_are_no_preflight_are_routed(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.ADMIN)
    answer = await stack.http.request("OPTIONS", "/v1/models", headers=bearer(key))
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def check_readable(answer: Any, status: int) -> None:
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.headers["vary"] == "Origin"
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= READ
    assert exposed >= {name for name in answer.headers if name.startswith("x-")} - {"x-accel-buffering"}


async def test_a_page_can_read_answers_and_errors(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.ADMIN)
    await stack.registry.add("loud")
    http, headers = stack.http, bearer(key)
    check_readable(await http.get("/health/live", headers={"origin": APP}), 200)
    check_readable(await http.get("/v1/models", headers=headers), 200)
    check_readable(await http.head("/v1/models", headers=headers), 200)
    check_readable(await http.get("/v1/models", headers={"origin": APP}), 401)
    check_readable(await http.get("/nothing", headers=headers), 404)
    check_readable(await http.get("/v1/completions", headers=headers), 405)
    check_readable(await http.post("/v1/completions", json={"model": 1}, headers=headers), 400)
    check_readable(await http.post("/v1/completions", json={"prompt": "x" * 2000}, headers=headers), 413)
    many = [*headers.items(), *(("x-many", "1") for _ in range(200))]
    check_readable(await http.get("/v1/models", headers=many), 431)  # by the edge itself
    for stream in (False, True):
        body = {"model": "loud", "prompt": "hello", "stream": stream}
        answer = await http.post("/v1/completions", json=body, headers=headers)
        check_readable(answer, 200)
        assert "H" in answer.text
    check_readable(
        await http.post(
            "/v1/completions", json={"model": stack.base, "prompt": "crash", "stream": True}, headers=headers
        ),
        500,
    )


async def test_limits_can_be_read(stack: Any) -> None:
    limits = KeyLimits(requests_per_minute=1, tokens_per_minute=1000)
    key = await stack.registry.keys.make(Scope.INFER, limits=limits)
    check_readable(await stack.http.get("/v1/models", headers=bearer(key)), 200)
    refused = await stack.http.get("/v1/models", headers=bearer(key))
    check_readable(refused, 429)
    assert refused.headers["retry-after"]


async def test_a_page_of_another_origin_is_answered_and_cannot_read_it(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    answer = await stack.http.get("/v1/models", headers=bearer(key, "https://evil.example"))
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("gateway_settings", [{}])
async def test_without_the_setting_no_page_can_read_anything(stack: Any) -> None:
    for origin in (APP, "http://localhost:5173", "null"):
        for answer in (
            await preflight(stack, origin),
            await stack.http.get("/version", headers={"origin": origin}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("gateway_settings", [{"allowed_origins": "*", "require_keys": True}])
async def test_any_page_with_a_key_can_read(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    for origin in (APP, "null"):
        assert (await preflight(stack, origin)).headers["access-control-allow-origin"] == "*"
        for headers, status in ((bearer(key, origin), 200), ({"origin": origin}, 401)):
            answer = await stack.http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
            assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("gateway_settings", [{"allowed_origins": "*"}])
async def test_without_keys_any_page_can_only_read_why_it_is_refused(stack: Any) -> None:
    headers = {"origin": "https://evil.example"}
    refused = await stack.http.post("/v1/completions", json={"model": stack.base, "prompt": "hi"}, headers=headers)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (403, "*")
    assert stack.inference.requests == []


def test_origins_are_read_as_browsers_send_them() -> None:
    text = f" {APP},http://localhost:5173,chrome-extension://abcdef, http://[::1]:8080,tauri://localhost ,"
    named = {APP, "http://localhost:5173", "chrome-extension://abcdef", "http://[::1]:8080", "tauri://localhost"}
    assert Origins.parse(text) == Origins(named=frozenset(named))
    assert Origins.parse(f"*,{APP}") == Origins(named=frozenset({APP}), any=True)
    assert not Origins.parse(None)
    assert not Origins.parse("")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((text, "is neither scheme://host, ") for text in ("app.example", "//app.example", "https://", "http:")),
        *((f"{APP}{end}", "is neither scheme://host, ") for end in ("/", "/chat", "?", "#x", "\\", "\x00", "é")),
        *((text, "is neither scheme://host, ") for text in ("https://*.example", "https://me@app.example", "**")),
        ("null", "the origin of every file and sandboxed page"),
        ("https://App.example", f"is sent by browsers as '{APP}'"),
        ("HTTPS://app.example:443", f"is sent by browsers as '{APP}'"),
        ("http://app.example:80", "is sent by browsers as 'http://app.example'"),
    ],
)
def test_what_no_browser_sends_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Origins.parse(f"http://localhost,{text}")
