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


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_another_method_is_not_allowed(stack: Any, method: str, path: str) -> None:
    response = await stack.http.request(method, path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert "POST" in response.headers["allow"]


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
