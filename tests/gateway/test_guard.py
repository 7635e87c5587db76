"""Who may call which route: every route with no key, with keys that lack a scope, and with odd ones."""

import asyncio
import time
from typing import Any

import openai
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from softprompt_api import errors
from softprompt_api.access import Scope
from softprompt_gateway.guard import refuse_without_keys
from softprompt_gateway.settings import Settings, SettingsError

OPEN = {"GET /health/live", "GET /health/ready", "GET /health", "GET /version"}
WANTED = {
    "POST /v1/completions": Scope.INFER,
    "POST /v1/chat/completions": Scope.INFER,
    "POST /v1/responses": Scope.INFER,
    "GET /v1/responses/{id_}": Scope.INFER,
    "DELETE /v1/responses/{id_}": Scope.INFER,
    "GET /v1/models": Scope.INFER,
    "GET /v1/models/{id_}": Scope.INFER,
    "POST /tokenize": Scope.INFER,
    "POST /detokenize": Scope.INFER,
    "POST /v1/load_lora_adapter": Scope.ADAPTERS_WRITE,
    "POST /v1/unload_lora_adapter": Scope.ADAPTERS_WRITE,
    "POST /v1/load_prompt_adapter": Scope.ADAPTERS_WRITE,
    "POST /v1/unload_prompt_adapter": Scope.ADAPTERS_WRITE,
    "GET /v1/adapters": Scope.ADAPTERS_READ,
    "POST /v1/adapters": Scope.ADAPTERS_WRITE,
    "GET /v1/adapters/{adapter}": Scope.ADAPTERS_READ,
    "POST /v1/adapters/{adapter}": Scope.ADAPTERS_WRITE,
    "PATCH /v1/adapters/{adapter}": Scope.ADAPTERS_WRITE,
    "DELETE /v1/adapters/{adapter}": Scope.ADAPTERS_WRITE,
    "GET /v1/adapters/{adapter}/versions": Scope.ADAPTERS_READ,
    "POST /v1/adapters/{adapter}/probe": Scope.ADAPTERS_WRITE,
    "GET /v1/adapters/{adapter}/nearest-tokens": Scope.ADAPTERS_READ,
    "PUT /v1/adapters/{adapter}/aliases/{alias}": Scope.ADAPTERS_WRITE,
    "DELETE /v1/adapters/{adapter}/aliases/{alias}": Scope.ADAPTERS_WRITE,
    "GET /v1/resident_adapters": Scope.ADMIN,
    "GET /metrics": Scope.ADMIN,
}
# What a key with one scope may call, of what is not open.
INCLUDES = {
    Scope.INFER: {Scope.INFER},
    Scope.ADAPTERS_READ: {Scope.ADAPTERS_READ},
    Scope.ADAPTERS_WRITE: {Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE},
    Scope.ADMIN: set(Scope),
}


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    """News of the first key takes its time; only what is about that may depend on it."""
    return {"require_keys": True}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def routes(stack: Any) -> set[str]:
    """Every route that the OpenAPI document shows."""
    document = (await stack.http.get("/openapi.json")).json()
    return {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}


async def call(stack: Any, route: str, headers: Any = None) -> Any:
    method, path = route.split()
    path = path.replace("{id_}", "x").replace("{adapter}", "x").replace("{alias}", "y")
    return await stack.http.request(method, path, headers=headers)


async def test_every_route_is_open_on_purpose_or_wants_a_scope(stack: Any) -> None:
    assert await routes(stack) == OPEN | WANTED.keys()


async def test_without_a_key_every_route_but_the_open_ones_is_refused(stack: Any) -> None:
    await stack.registry.keys.make(Scope.ADMIN)
    for route in WANTED:
        answer = await call(stack, route)
        assert answer.status_code == 401, route
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert answer.headers["www-authenticate"] == "Bearer"
    for route in OPEN:
        assert (await call(stack, route)).status_code == 200, route
    assert stack.inference.requests == []
    assert stack.registry.headers == []


async def test_head_is_let_in_and_refused_as_get(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    for path in ("/v1/models", "/metrics"):
        assert (await stack.http.head(path)).status_code == 401
    assert (await stack.http.head("/v1/models", headers=bearer(key))).status_code == 200
    assert (await stack.http.head("/metrics", headers=bearer(key))).status_code == 403
    assert (await stack.http.head("/health")).status_code == 200


@pytest.mark.parametrize("scope", Scope)
async def test_a_key_opens_the_routes_of_its_scope_and_no_other(stack: Any, scope: Scope) -> None:
    key = await stack.registry.keys.make(scope)
    for route, wanted in WANTED.items():
        answer = await call(stack, route, bearer(key))
        if wanted in INCLUDES[scope]:
            assert answer.status_code not in (401, 403), route
        else:
            assert answer.status_code == 403, route
            assert answer.json()["error"]["code"] == "permission_denied"


ODD = [
    b"", b"Bearer", b"Bearer ", b"Bearer  ", b"Basic %b", b"%b", b"Bearer %b x", b'Bearer "%b"', b"Bearer '%b'",
    b"Bearer %b,Bearer %b", b"Bearer %b\xe9", "Bearer ключ".encode(), b"Bearer %b\x00", b"Bearer\t%b", b"Token %b",
    b"Bearer " + b"x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
async def test_an_odd_authorization_is_refused(stack: Any, odd: bytes) -> None:
    key = (await stack.registry.keys.make(Scope.ADMIN)).encode()
    request = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: %b\r\n\r\n"
    reader, _ = await stack.connect(request % odd.replace(b"%b", key))
    status = (await reader.readline()).split()[1]
    assert status in (b"400", b"401")
    assert key not in await reader.read()


@pytest.mark.parametrize("second", [b"Bearer x", b"Bearer %b", b""])
async def test_two_authorizations_are_refused(stack: Any, second: bytes) -> None:
    key = (await stack.registry.keys.make(Scope.ADMIN)).encode()
    first = b"authorization: Bearer %b\r\n" % key
    other = b"authorization: " + second.replace(b"%b", key) + b"\r\n"
    reader, _ = await stack.connect(
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + first + other + b"\r\n"
    )
    assert (await reader.readline()).split()[1] == b"400"


@pytest.mark.parametrize(
    "line",
    [
        b"GET /v1/models HTTP/1.1\r\nhost: a/health?x=",
        b"GET http://a/health?x=/v1/models HTTP/1.1\r\nhost: a",
        b"GET //health/../v1/models HTTP/1.1\r\nhost: a",
        b"GET /v1/models?x=/health HTTP/1.1\r\nhost: a",
        b"GET /%76%31/models HTTP/1.1\r\nhost: a",
    ],
)
async def test_no_spelling_of_the_target_gets_past_the_key(stack: Any, line: bytes) -> None:
    await stack.registry.keys.make(Scope.ADMIN)
    reader, _ = await stack.connect(line + b"\r\nconnection: close\r\n\r\n")
    assert (await reader.readline()).split()[1] in (b"400", b"401", b"404")
    assert stack.base.encode() not in await reader.read()


async def test_the_scheme_is_spelled_in_any_case(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await stack.http.get("/v1/models", headers={"authorization": f"{scheme} {key}"})
        assert answer.status_code == 200


async def test_openais_own_client_is_let_in_and_refused(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    async with stack.sdk(api_key=key) as client:
        answer = await client.completions.create(model=stack.base, prompt="hi", max_tokens=100)
        assert answer.choices[0].text == "hi"
        stream = await client.completions.create(model=stack.base, prompt="hi", max_tokens=100, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hi"
    async with stack.sdk(api_key="sk-sp-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.models.list()
        assert refused.value.code == "invalid_api_key"
    key = await stack.registry.keys.make(Scope.ADAPTERS_READ)
    async with stack.sdk(api_key=key) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.list()


@pytest.mark.parametrize("gateway_settings", [{}])
async def test_on_this_machine_no_key_is_asked_for_until_the_first_was_made(stack: Any) -> None:
    for headers in ({}, bearer("none")):
        assert (await stack.http.get("/v1/models", headers=headers)).status_code == 200
    key = await stack.registry.keys.make(Scope.ADMIN)
    await _until_refused(stack, "none")
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200
    assert (await stack.http.get("/v1/models")).status_code == 401
    await stack.registry.keys.revoke(key)
    await _until_refused(stack, key)
    assert (await stack.http.get("/v1/models")).status_code == 401, "revoking the last key opens nothing"


@pytest.mark.parametrize("gateway_settings", [{}])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:2242"}, 200),
        ({"host": "[::1]:2242"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:2242", "origin": "http://127.0.0.1.evil.example:2242"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_web_pages_of_others_cannot_use_that_no_key_is_asked_for(
    stack: Any, headers: dict[str, str], status: int
) -> None:
    answer = await stack.http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 403:
        message = answer.json()["error"]["message"]
        assert ("make a key" if "host" in headers else "allowed_origins (--allowed-origins) names") in message
    assert (await stack.http.get("/health", headers=headers)).status_code == 200
    key = await stack.registry.keys.make(Scope.ADMIN)
    await _until_refused(stack, "none")
    assert (await stack.http.get("/v1/models", headers=bearer(key) | headers)).status_code == 200


NAMED = {"allowed_origins": "https://app.example,http://[2001:db8::1]:3000"}
PAGE = {"origin": "https://app.example"}


@pytest.mark.parametrize("gateway_settings", [NAMED, NAMED | {"insecure": True}])
async def test_a_page_of_an_allowed_origin_needs_no_key_where_none_is_asked_for(stack: Any) -> None:
    for headers in (PAGE, {"origin": "http://[2001:db8::1]:3000"}):
        assert (await stack.http.get("/v1/models", headers=headers)).status_code == 200
        assert (await stack.http.get("/metrics", headers=headers)).status_code == 200
    for origin in ("https://app.example.evil.example", "https://app.example:8443", "http://app.example", "null"):
        assert (await stack.http.get("/v1/models", headers={"origin": origin})).status_code == 403


@pytest.mark.parametrize("gateway_settings", [NAMED])
async def test_an_allowed_origin_does_not_undo_that_this_machine_must_be_named(stack: Any) -> None:
    rebound = await stack.http.get("/v1/models", headers=PAGE | {"host": "app.example"})
    assert rebound.status_code == 403


@pytest.mark.parametrize("gateway_settings", [{"allowed_origins": "*"}])
async def test_any_origin_is_for_requests_with_a_key(stack: Any) -> None:
    refused = await stack.http.get("/v1/models", headers=PAGE)
    assert refused.status_code == 403
    assert refused.json()["error"]["message"].endswith("names that origin, for which `*` is not enough")
    key = await stack.registry.keys.make(Scope.INFER)
    await _until_refused(stack, "none")
    assert (await stack.http.get("/v1/models", headers=PAGE | bearer(key))).status_code == 200


@pytest.mark.parametrize("gateway_settings", [{"allowed_origins": "*,https://app.example", "insecure": True}])
async def test_any_page_may_ask_an_insecure_servers_models_and_not_administer_it(stack: Any) -> None:
    await stack.registry.add("loud")
    for route, wanted in WANTED.items():
        answer = await call(stack, route, {"origin": "https://evil.example"})
        assert (answer.status_code == 403) == (wanted is not Scope.INFER), route
        assert (await call(stack, route, PAGE)).status_code != 403, route


async def test_keys_can_be_required_before_the_first_was_made(stack: Any) -> None:
    assert (await stack.http.get("/v1/models")).status_code == 401
    key = await stack.registry.keys.make(Scope.INFER)
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200


@pytest.mark.parametrize("gateway_settings", [{"insecure": True}])
async def test_an_insecure_gateway_asks_nobody(stack: Any) -> None:
    await stack.registry.keys.make(Scope.ADMIN)
    # A proxy before it passes on the name that its clients know.
    for headers in ({}, bearer("wrong"), {"host": "api.example", "origin": "https://api.example"}):
        assert (await stack.http.get("/metrics", headers=headers)).status_code == 200
    assert (await stack.http.get("/metrics", headers={"origin": "https://evil.example"})).status_code == 403


async def test_a_key_is_good_at_once_though_nobody_told_of_it(stack: Any) -> None:
    stack.registry.keys.silent = True
    key = await stack.registry.keys.make(Scope.INFER)
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200
    assert stack.registry.keys.asked == 1


async def test_a_known_key_is_not_asked_for(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    async with asyncio.timeout(5):
        asked = -1
        while asked != stack.registry.keys.asked:  # until it was told of
            asked = stack.registry.keys.asked
            assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200
    stack.registry.error = errors.Unavailable("away")
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_a_revoked_key_is_refused_within_a_second_and_what_runs_ends_well(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    body = {"model": stack.base, "prompt": "wait", "max_tokens": 100}
    running = asyncio.create_task(stack.http.post("/v1/completions", json=body, headers=bearer(key)))
    await stack.inference.until(lambda fake: fake.running == 1)
    began = time.monotonic()
    await stack.registry.keys.revoke(key)
    await _until_refused(stack, key)
    assert time.monotonic() - began < 1
    stack.inference.released.set()
    assert (await running).status_code == 200


@pytest.mark.parametrize("gateway_settings", [{"require_keys": True, "registry_timeout_s": 0.5}])
async def test_while_the_registry_is_away_known_keys_are_good_and_others_wait(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER)
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200
    await stack.services["registry"].stop(0)
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200
    unknown = await stack.http.get("/v1/models", headers=bearer("sk-sp-unknown"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "unavailable")
    assert (await stack.http.get("/v1/models")).status_code == 401


@pytest.mark.parametrize("seconds", [-1, 0])
async def test_an_expired_key_is_refused(stack: Any, seconds: int) -> None:
    key = await stack.registry.keys.make(Scope.ADMIN, expires_at=Timestamp(seconds=int(time.time()) + seconds))
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 401


async def test_a_key_that_ends_later_is_good(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER, expires_at=Timestamp(seconds=int(time.time()) + 3600))
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_a_scope_of_a_later_version_allows_nothing(stack: Any) -> None:
    key = await stack.registry.keys.make(wire_scopes=[99])
    assert (await stack.http.get("/v1/models", headers=bearer(key))).status_code == 403


async def test_the_log_tells_whose_request_it_was_and_never_the_key(stack: Any, logged: list[Any]) -> None:
    key = await stack.registry.keys.make(Scope.ADMIN, tenant="acme")
    await stack.http.get("/v1/models", headers=bearer(key))
    await stack.http.get("/v1/models", headers=bearer("sk-sp-guessed"))
    lines = [line for line in logged if line["event"] == "request"]
    assert [(line["status"], line.get("tenant")) for line in lines] == [(200, "acme"), (401, None)]
    assert lines[0]["key"].startswith("key-")
    assert key not in repr(logged)
    assert "guessed" not in repr(logged)


async def test_changes_by_admins_are_audited_however_they_end(stack: Any, logged: list[Any]) -> None:
    key = await stack.registry.keys.make(Scope.ADAPTERS_WRITE)
    await stack.registry.add("tweets")
    await stack.http.delete("/v1/adapters/tweets", headers=bearer(key))
    await stack.http.delete("/v1/adapters/tweets", headers=bearer(key))
    lines = [line for line in logged if line["event"] == "audit"]
    assert [(line["action"], line["adapter"], line["outcome"]) for line in lines] == [
        ("adapter.delete", "tweets", "done"),
        ("adapter.delete", "tweets", "ADAPTER_NOT_FOUND"),
    ]
    assert all(line["key"].startswith("key-") for line in lines)


class Registry:
    """What `refuse_without_keys` asks."""

    def __init__(self, *, ever_made: bool = False, error: Exception | None = None) -> None:
        self._answer = ever_made, error

    async def list_keys(self, request: Any) -> Any:
        ever_made, error = self._answer
        if error is not None:
            raise error
        return type("Page", (), {"ever_made": ever_made})


async def test_beyond_this_machine_a_gateway_without_keys_does_not_start() -> None:
    with pytest.raises(SettingsError, match="softprompt key create --scopes admin"):
        await refuse_without_keys(Settings(host="0.0.0.0"), Registry())


@pytest.mark.parametrize(
    ("settings", "registry"),
    [
        (Settings(), Registry()),
        (Settings(host="localhost"), Registry()),
        (Settings(host="::1"), Registry()),
        (Settings(host="0.0.0.0", require_keys=True), Registry()),
        (Settings(host="0.0.0.0", insecure=True), Registry()),
        (Settings(host="0.0.0.0"), Registry(ever_made=True)),
        (Settings(host="0.0.0.0"), Registry(error=errors.Unavailable("away"))),
    ],
)
async def test_otherwise_it_starts(settings: Settings, registry: Registry) -> None:
    await refuse_without_keys(settings, registry)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org"])
def test_beyond_this_machine_a_key_is_always_asked_for(host: str) -> None:
    assert Settings(host=host).always_asks_for_keys
    assert not Settings(host=host, insecure=True).always_asks_for_keys
    assert not Settings().always_asks_for_keys


async def _until_refused(stack: Any, key: str) -> None:
    async with asyncio.timeout(5):
        while (await stack.http.get("/v1/models", headers=bearer(key))).status_code != 401:
            pass
