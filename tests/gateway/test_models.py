"""GET /v1/models: the base model and what the registry has, followed as it changes."""

import asyncio
import json
from typing import Any

import openai
import pytest
from softprompt_api import errors
from softprompt_gateway.openai.models import listing


async def test_the_base_model_is_its_own_root(stack: Any) -> None:
    data = (await stack.http.get("/v1/models")).json()
    assert data["object"] == "list"
    assert data["data"] == [
        {
            "id": "acme/tiny-1",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "softprompt",
            "root": "acme/tiny-1",
            "parent": None,
            "max_model_len": 512,
        }
    ]


async def test_an_adapter_has_its_version_as_root_and_the_base_model_as_parent(stack: Any) -> None:
    await stack.registry.add("loud")
    version = await stack.registry.add("loud", virtual_tokens=9)
    await stack.until_listed("loud")
    card = (await stack.http.get("/v1/models/loud")).json()
    assert card == {
        "id": "loud",
        "object": "model",
        "created": 1_700_000_100,
        "owned_by": "softprompt",
        "root": "loud@2",
        "parent": "acme/tiny-1",
        "max_model_len": 512,
        "adapter": {
            "kind": "PROMPT_TUNING",
            "version": 2,
            "digest": version.digest,
            "num_virtual_tokens": 9,
            "rank": 0,
            "state": "ready",
        },
    }
    assert card in (await stack.http.get("/v1/models")).json()["data"]


async def test_the_card_of_a_lora_tells_its_rank(stack: Any) -> None:
    version = (await stack.registry.add("lora", kind="LORA")).version
    stack.registry.versions["lora"][version].rank = 16
    assert (await stack.http.get("/v1/models/lora")).json()["adapter"]["rank"] == 16


async def test_the_listing_follows_the_registry(stack: Any) -> None:
    await stack.registry.add("b")
    await stack.registry.add("a")
    await stack.until_listed("a", "b")
    assert await stack.listed() == ["acme/tiny-1", "a", "b"]
    await stack.http.delete("/v1/adapters/a")
    await stack.until_listed("b")


async def test_openais_client_lists_and_retrieves(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    await stack.registry.add("loud")
    await stack.until_listed("loud")
    assert [model.id async for model in sdk.models.list()] == ["acme/tiny-1", "loud"]
    assert (await sdk.models.retrieve("acme/tiny-1")).id == "acme/tiny-1"
    assert (await sdk.models.retrieve("loud@1")).id == "loud@1"


async def test_an_adapter_of_several_tasks_is_a_model_for_each(stack: Any) -> None:
    version = await stack.registry.add("many", num_tasks=2)
    await stack.until_listed("many:0", "many:1")
    card = (await stack.http.get("/v1/models/many:1")).json()
    assert (card["id"], card["root"]) == ("many:1", "many@1:1")
    assert card in (await stack.http.get("/v1/models")).json()["data"]
    for model in ("many:1", "many@1:1", f"{version.digest}:1", "acme/tiny-1:many:1"):
        response = await stack.complete("hi", model=model)
        assert response.headers["x-softprompt-adapter"] == "many@1:1"
        assert response.headers["x-softprompt-adapter-digest"] == f"{version.digest}:1"
        assert stack.inference.requests[-1].adapter == f"{version.digest}:1"


@pytest.mark.parametrize(
    ("model", "num_tasks", "message"),
    [
        ("a", 2, "a has the tasks 0 to 1; name one of them, for example a:0"),
        ("a:2", 2, "and no task 2"),
        ("a:0", 0, "a has no tasks"),
    ],
)
async def test_a_task_that_is_not_there_or_not_named_is_refused_with_the_field(
    stack: Any, model: str, num_tasks: int, message: str
) -> None:
    await stack.registry.add("a", num_tasks=num_tasks)
    response = await stack.complete("hi", model=model)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert message in response.json()["error"]["message"]


async def test_one_task_alone_is_never_deleted_or_described(stack: Any) -> None:
    await stack.registry.add("a", num_tasks=2)
    assert (await stack.http.delete("/v1/adapters/a:0")).status_code == 400
    assert (await stack.http.get("/v1/adapters/a:0")).status_code == 400
    assert "a" in stack.registry.versions


@pytest.mark.parametrize("path", ["acme/tiny-1", "acme%2Ftiny-1"])
async def test_a_base_id_with_a_slash_is_found(stack: Any, path: str) -> None:
    assert (await stack.http.get(f"/v1/models/{path}")).json()["id"] == "acme/tiny-1"


@pytest.mark.parametrize("path", ["nothing", "loud@9", "..%2f..%2fetc", "a/b/c"])
async def test_an_unknown_model_is_not_found(stack: Any, path: str) -> None:
    response = await stack.http.get(f"/v1/models/{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_known_adapters_serve_while_the_registry_is_away(stack: Any) -> None:
    version = await stack.registry.add("loud")
    await stack.until_listed("loud")
    await stack.services["registry"].stop(0)
    for model in ("loud", "loud@1", version.digest):
        response = await stack.complete("hi", model=model)
        assert response.headers["x-softprompt-adapter"] == "loud@1"
    assert await stack.listed() == ["acme/tiny-1", "loud"]


async def test_an_unknown_adapter_is_unavailable_while_the_registry_is_away(stack: Any) -> None:
    await stack.services["registry"].stop(0)
    response = await stack.complete("hi", model="loud")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"] == {
        "message": "the registry service is not available; try again",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }


async def test_without_an_inference_service_requests_say_so(stack: Any) -> None:
    await stack.services["inference"].stop(0)
    response = await stack.complete("hi")
    assert response.status_code == 503
    assert "127.0.0.1" not in response.text
    assert "inference service is not available" in response.json()["error"]["message"]


async def test_the_base_model_is_remembered_while_the_inference_service_restarts(stack: Any) -> None:
    await stack.listed()
    stack.inference.model_error = errors.Unavailable("starting")
    assert await stack.listed() == ["acme/tiny-1"]


async def test_a_long_list_leaves_others_their_turns() -> None:
    cards = [{"id": f"a{number}"} for number in range(1000)]
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    pieces = [piece async for piece in listing(iter(cards))]
    task.cancel()
    assert json.loads(b"".join(pieces)) == {"object": "list", "data": cards}
    assert len(pieces) > 10
    assert turns >= len(pieces) - 1


async def test_what_is_too_large_to_be_served_is_no_model(stack: Any) -> None:
    await stack.registry.add("wide", virtual_tokens=513)
    await stack.registry.add("deep", kind="LORA", virtual_tokens=0, rank=65)
    await stack.registry.add("fits", virtual_tokens=512)
    await stack.until_listed("fits")
    for name, found in (
        ("wide", "has 513 virtual tokens; at most 512"),
        ("deep", "has 65 as its rank; at most 64"),
    ):
        answer = await stack.http.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_invalid")
        assert found in answer.json()["error"]["message"]
