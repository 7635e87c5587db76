"""What every route has in common: the shape of errors, request ids, the documentation, the log."""

import asyncio
from typing import Any

import pytest

POST_ROUTES = [
    *("/v1/completions", "/v1/chat/completions", "/v1/responses"),
    *("/tokenize", "/detokenize", "/v1/adapters"),
]


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v1/completions/", "/v1//models", "/%2e%2e/etc/passwd"]
)
async def test_an_unknown_route_is_not_found(stack: Any, path: str) -> None:
    response = await stack.http.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert response.headers["x-request-id"]


async def refusal(stack: Any, method: str, path: str) -> str:
    """The message of a 404."""
    response = await stack.http.request(method, path)
    assert response.status_code == 404, response.text
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("not_found", "invalid_request_error", None)
    return str(error["message"])


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/completions", "/v1/completions"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/v1/completions/", "/v1/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/models/loud", "/v1/models/loud"),
        ("/adapters/loud/versions", "/v1/adapters/loud/versions"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
        ("/healthz", "/health"),
    ],
)
async def test_an_unknown_route_tells_the_one_that_was_meant(stack: Any, path: str, meant: str) -> None:
    told = await refusal(stack, "POST", path)
    assert told == f"there is no such route: 'POST {path}'; did you mean '{meant}'?"


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/embeddings", "/embeddings", "/v1/v1/embeddings", "/v1/moderations", "/v1/audio/speech"),
        *("/v1/images/generations", "/v1/files", "/v1/batches", "/v1/assistants", "/v1/fine_tuning/jobs"),
        *("/v1/responses/input_tokens", "/v1/responses/compact", "/v1/responses/resp_1/cancel"),
        *("/v1/chat/completions/chatcmpl-1/messages", "/v1/threads/t/runs", "/v1/rerank", "/v1/realtime/sessions"),
    ],
)
async def test_what_else_openai_has_is_told_to_be_not_served(stack: Any, path: str) -> None:
    assert (await refusal(stack, "POST", path)).startswith(f"'POST {path}' is not served here; /docs shows")


@pytest.mark.parametrize("path", ["/", "/v1", "/secret/in/a/path"])
async def test_without_a_near_route_the_documentation_is_named(stack: Any, path: str) -> None:
    told = await refusal(stack, "GET", path)
    assert told == f"there is no such route: 'GET {path}'; /docs shows those that there are"


@pytest.mark.parametrize("path", ["/a" * 20_000, "/v1/" * 2000 + "completions", "/%00%0d%0a%1b[31m%ff" * 100])
async def test_a_path_is_shown_short_and_escaped(stack: Any, path: str) -> None:
    told = await refusal(stack, "GET", path)
    assert len(told) < 1000
    assert told.isascii()
    assert told.isprintable()


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_another_method_is_not_allowed(stack: Any, method: str, path: str) -> None:
    response = await stack.http.request(method, path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert "POST" in response.headers["allow"]


async def test_allowed_are_the_methods_of_all_routes_of_a_path(stack: Any) -> None:
    for method in ("PUT", "POST"):
        response = await stack.http.request(method, "/v1/responses/resp_1")
        assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET, HEAD")
    response = await stack.http.head("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models", "/v1/models/loud", "/v1/models/nobody", "/v1/adapters", "/v1/adapters/loud/versions"),
        *("/health", "/health/live", "/version", "/docs", "/openapi.json"),
    ],
)
async def test_head_has_the_headers_of_get_and_no_body(stack: Any, path: str) -> None:
    await stack.registry.add("loud")
    await stack.until_listed("loud")
    got, head = await stack.http.get(path), await stack.http.head(path)
    passing = {"x-request-id", "date"}
    assert head.status_code == got.status_code
    assert {name: value for name, value in head.headers.items() if name not in passing} == {
        name: value for name, value in got.headers.items() if name not in passing
    }
    assert head.content == b""


@pytest.mark.parametrize("path", [b"/v1/models", b"/metrics", b"/health"])
async def test_nothing_is_sent_behind_the_headers_that_answer_head(stack: Any, path: bytes) -> None:
    ask = b"%b " + path + b" HTTP/1.1\r\nhost: localhost\r\n%b\r\n"
    reader, _ = await stack.connect(ask % (b"HEAD", b"") + ask % (b"GET", b"connection: close\r\n"))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    # Where the next answer begins, this one has ended.
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_the_log_tells_head_by_its_name(stack: Any, logged: list[Any]) -> None:
    await stack.http.head("/v1/models")
    [line] = [line for line in logged if line["event"] == "request"]
    assert (line["method"], line["route"], line["status"]) == ("HEAD", "/v1/models", 200)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_the_documentation_tells_what_is_allowed(stack: Any, path: str) -> None:
    response = await stack.http.post(path)
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert response.json()["error"]["message"] == "'POST' is not allowed here; GET, HEAD is"


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "é".encode()])
async def test_an_odd_request_id_is_replaced(stack: Any, sent: Any) -> None:
    response = await stack.http.get("/version", headers={"x-request-id": sent})
    assert len(response.headers["x-request-id"]) == 32


async def test_two_request_ids_are_replaced(stack: Any) -> None:
    response = await stack.http.get("/version", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert len(response.headers["x-request-id"]) == 32


async def test_the_openapi_document_shows_the_request_models(stack: Any) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path in POST_ROUTES:
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        for one in schema.get("anyOf", [schema]):
            assert one["$ref"].removeprefix("#/components/schemas/") in schemas
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["CompletionRequest"]["required"] == ["model", "prompt"]
    assert "HTTPValidationError" not in schemas
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    assert (await stack.http.get("/docs")).status_code == 200


async def test_each_request_is_logged_once_without_its_content(stack: Any, logged: list[Any]) -> None:
    await stack.complete("secret words")
    await stack.http.get("/v1/models/secret")
    lines = [line for line in logged if line["event"] == "request"]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/v1/completions", 200),
        ("/v1/models/{id_:path}", 404),
    ]
    assert "secret" not in repr(lines)


async def test_the_log_tells_what_answered_and_how_many_tokens_that_took(stack: Any, logged: list[Any]) -> None:
    await stack.registry.add("loud")
    for body in ({}, {"stream": True}):
        await stack.complete("hello", model="loud", **body)
        await stack.post("/v1/responses", model="loud", input="hello", **body)
    await stack.complete("refuse OVERLOADED", model="loud")
    await stack.complete("break OVERLOADED")
    *answered, refused, broken = [line for line in logged if line["event"] == "request"]
    told = {
        "model": "loud",
        "adapters": "loud@1",
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "cached_tokens": 3,
        "finished": "stop",
        "status": 200,
    }
    assert len(answered) == 4
    for line in answered:
        assert {name: line[name] for name in told} == told
        assert 0 < line["first_token_s"] <= line["seconds"]
    assert (refused["model"], refused["status"], "prompt_tokens" in refused) == ("loud", 503, False)
    assert (broken["model"], broken["finished"], broken["completion_tokens"]) == (stack.base, "error", 1)
    assert "adapters" not in broken


async def test_a_defect_is_logged_and_answered_without_its_text(stack: Any, logged: list[Any]) -> None:
    stack.registry.error = RuntimeError("secret in /etc/passwd")
    response = await stack.http.get("/v1/adapters")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "passwd" not in response.text
    assert any(line["event"] == "request failed" for line in logged)


@pytest.mark.parametrize("gateway_settings", [{"max_requests": 2}])
async def test_more_requests_than_allowed_are_told_to_come_back(stack: Any) -> None:
    running = [asyncio.create_task(stack.complete("wait")) for _ in range(2)]
    await stack.inference.until(lambda fake: fake.running == 2)
    refused = await stack.complete("hello")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    assert (await stack.http.get("/health/ready")).status_code == 200
    stack.inference.released.set()
    assert [(await answer).status_code for answer in running] == [200, 200]
    assert (await stack.complete("hello")).status_code == 200
