"""The OpenAPI document is whole, and tells of answers as they are."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from softprompt_gateway.adapters import answers as adapters
from softprompt_gateway.health import Alive, Health, Version
from softprompt_gateway.openai import answers as openai

OPEN = {"/health", "/health/live", "/health/ready", "/version"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'


@pytest.fixture
async def document(stack: Any) -> dict[str, Any]:
    document: dict[str, Any] = (await stack.http.get("/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def members(value: Any, key: str) -> Iterator[Any]:
    """Every member of this name, however deep."""
    if isinstance(value, dict):
        for name, member in value.items():
            if name == key:
                yield member
            yield from members(member, key)
    elif isinstance(value, list):
        for item in value:
            yield from members(item, key)


def found(document: dict[str, Any], pointer: str) -> Any:
    """What a reference into the document points to."""
    assert pointer.startswith("#/")
    value: Any = document
    for part in pointer[2:].split("/"):
        value = value[part.replace("~1", "/").replace("~0", "~")]
    return value


async def test_every_answer_and_every_error_has_its_shape(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        responses = operation["responses"]
        good = [status for status in responses if status[0] == "2"]
        assert len(good) == 1, (path, method)
        for response in responses.values():
            assert response["headers"]["x-request-id"]["required"]
        if "text/plain" not in responses[good[0]]["content"]:
            assert list(responses[good[0]]["content"]["application/json"]["schema"]) == ["$ref"], (path, method)
        for status in ("4XX", "5XX"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}
        assert "default" not in responses


async def test_references_and_links_lead_somewhere(document: dict[str, Any]) -> None:
    assert all(found(document, pointer) for pointer in members(document, "$ref"))
    links = [link for links in members(document, "links") for link in links.values()]
    assert len(links) > 10
    for link in links:
        operation = found(document, link["operationRef"])
        assert {parameter["name"] for parameter in operation["parameters"]} >= link["parameters"].keys()


async def test_every_operation_says_which_scope_it_needs(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        if path in OPEN:
            assert operation["security"] == []
        else:
            [[scope], _] = [one.get("api_key", []) for one in operation["security"]]
            assert scope in ("infer", "adapters:read", "adapters:write", "admin")


def check(response: httpx.Response, model: type[BaseModel], status: int = 200) -> None:
    assert response.status_code == status, response.text
    model.model_validate_json(response.content, strict=True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 2, "logprobs": 2, "return_token_ids": True},
        {"prompt": ["one", "two"], "echo": True, "stop": "w"},
        {"echo": True, "logprobs": 1, "prompt_logprobs": 1},
        {"model": "loud", "stream_options": {"include_usage": True}},
    ],
)
async def test_completions_are_as_documented(stack: Any, body: dict[str, Any]) -> None:
    await stack.registry.add("loud")
    asked = {"model": stack.base, "prompt": "hello", **body}
    if "stream_options" not in body:
        check(await stack.post("/v1/completions", **asked), openai.Completion)
    for event in await stack.events("/v1/completions", **asked):
        if event != "[DONE]":
            openai.CompletionChunk.model_validate(event, strict=True)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"tools": [TOOL], "messages": [{"role": "user", "content": f"so {CALL}{CALL}"}]},
        {"stream_options": {"include_usage": True}},
    ],
)
async def test_chat_is_as_documented(stack: Any, body: dict[str, Any]) -> None:
    asked = {"model": stack.base, "messages": [{"role": "user", "content": "hello"}], **body}
    if "stream_options" not in body:
        check(await stack.post("/v1/chat/completions", **asked), openai.ChatCompletion)
    for event in await stack.events("/v1/chat/completions", **asked):
        if event != "[DONE]":
            openai.ChatChunk.model_validate(event, strict=True)


async def test_models_and_tokens_are_as_documented(stack: Any) -> None:
    for name in ("loud", "soft"):
        await stack.registry.add(name)
    await stack.until_listed("loud", "soft")
    check(await stack.http.get("/v1/models"), openai.ModelList)
    for name in (stack.base, "loud@1", "loud+soft"):
        check(await stack.http.get(f"/v1/models/{name}"), openai.ModelCard)
    for strings in (False, True):
        check(await stack.post("/tokenize", prompt="hello", return_token_strs=strings), openai.Tokenized)
    check(await stack.post("/detokenize", tokens=[104, 105]), openai.Detokenized)


async def test_adapters_are_as_documented(stack: Any) -> None:
    body = {
        "name": "loud",
        "config": {"peft_type": "PROMPT_TUNING"},
        "tensors_base64": base64.b64encode(b"x").decode(),
    }
    check(await stack.post("/v1/adapters", **body), adapters.AdapterAnswer, 201)
    check(await stack.http.post("/v1/adapters/loud/probe"), adapters.AdapterAnswer)
    check(await stack.http.get("/v1/adapters"), adapters.AdapterList)
    check(await stack.http.get("/v1/adapters/loud"), adapters.ShownAdapter)
    check(await stack.http.get("/v1/adapters/loud/versions"), adapters.VersionList)
    check(await stack.http.get("/v1/adapters/loud/nearest-tokens"), adapters.NearestTokens)
    check(await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1}), adapters.AdapterAnswer)
    check(await stack.http.patch("/v1/adapters/loud@1", json={"pinned": False}), adapters.AdapterAnswer)
    check(await stack.http.get("/v1/resident_adapters"), adapters.ResidentList)
    check(await stack.http.delete("/v1/adapters/loud/aliases/prod"), adapters.AliasDeleted)
    check(await stack.http.delete("/v1/adapters/loud"), adapters.AdapterDeleted)


async def test_health_is_as_documented(stack: Any) -> None:
    check(await stack.http.get("/health/live"), Alive)
    check(await stack.http.get("/version"), Version)
    check(await stack.http.get("/health"), Health)
    await stack.services["inference"].stop(0)
    check(await stack.http.get("/health/ready"), Health, 503)


async def test_an_error_is_as_documented(stack: Any, document: dict[str, Any]) -> None:
    error = document["components"]["schemas"]["Error"]
    told = (await stack.http.get("/nothing")).json()
    assert told.keys() == set(error["required"])
    assert told["error"].keys() == set(error["properties"]["error"]["required"])
    assert json.dumps(error).count('"additionalProperties": false') == 2
