"""The admin routes over the real registry and a real store: real PEFT files, streamed in and used."""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from softprompt_api.rpc.channel import open_channel
from softprompt_gateway.clients import RegistryClient

HIDDEN = 8
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": HIDDEN}


@pytest.fixture
def gateway_settings(registry_address: str) -> dict[str, Any]:
    return {"registry_address": registry_address}


def _tensors(seed: int = 0, *, rows: int = 5) -> bytes:
    values = np.random.default_rng(seed).standard_normal((rows, HIDDEN), dtype=np.float32)
    return bytes(save({"prompt_embeddings": values}, metadata={"format": "pt"}))


async def _upload(stack: Any, name: str, tensors: bytes, config: dict[str, Any] = CONFIG) -> Any:
    headers = {
        "content-type": "application/octet-stream",
        "x-adapter-config": base64.b64encode(json.dumps(config).encode()).decode(),
        "x-adapter-sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return await stack.http.post(f"/v1/adapters/{name}", content=tensors, headers=headers)


async def test_adapters_are_listed_by_labels_and_from_either_end(stack: Any) -> None:
    for name, team in (("loud", "a"), ("calm", "b"), ("mild", "a")):
        body = {"name": name, "config": CONFIG, "tensors_base64": base64.b64encode(_tensors()).decode()}
        assert (await stack.post("/v1/adapters", **body, labels={"team": team, "is": "x=y"})).status_code == 201

    async def names(query: str) -> list[str]:
        listed = await stack.http.get(f"/v1/adapters?{query}")
        return [each["name"] for each in listed.json()["data"]]

    assert await names("labels=team%3Da") == ["loud", "mild"]
    assert await names("labels=team=a&labels=is=x=y&descending=true") == ["mild", "loud"]
    assert await names("labels=team=a&labels=team=a") == ["loud", "mild"]
    assert await names("labels=team=c") == []
    assert await names("descending=true&page_size=2") == ["mild", "loud"]
    for query, field in (
        ("labels=team", "labels"),
        ("labels==a", "labels"),
        ("labels=a=b&labels=a=c", "labels"),
        ("descending=up", "descending"),
    ):
        refused = await stack.http.get(f"/v1/adapters?{query}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


async def test_an_adapter_lives_from_its_upload_to_its_deletion(stack: Any) -> None:
    first = await _upload(stack, "loud", _tensors(1))
    assert first.status_code == 201, first.text
    body = {"name": "loud", "config": CONFIG, "tensors_base64": base64.b64encode(_tensors(2)).decode()}
    second = await stack.post("/v1/adapters", **body)
    assert second.status_code == 201, second.text
    assert (first.json()["model"], second.json()["model"]) == ("loud@1", "loud@2")
    assert first.json()["digest"] != second.json()["digest"]

    used = await stack.complete("hi", model="loud")
    assert used.headers["x-softprompt-adapter-digest"] == second.json()["digest"]
    assert await stack.listed() == [stack.base, "loud"]
    versions = (await stack.http.get("/v1/adapters/loud/versions")).json()["data"]
    assert [version["version"] for version in versions] == [2, 1]
    shown = (await stack.http.get("/v1/adapters/loud@1")).json()
    assert (shown["kind"], shown["num_virtual_tokens"]) == ("PROMPT_TUNING", 5)
    assert json.loads(shown["config_json"]) == CONFIG

    await stack.http.delete("/v1/adapters/loud@2")
    back = await stack.complete("hi", model="loud")
    assert back.headers["x-softprompt-adapter-digest"] == first.json()["digest"]
    assert (await stack.http.delete("/v1/adapters/loud")).json()["deleted_versions"] == 1
    assert (await stack.complete("hi", model="loud")).json()["error"]["code"] == "model_not_found"
    await stack.until_listed()


@pytest.mark.parametrize(
    ("tensors", "config", "field"),
    [
        (b"\x80\x02pickle" + b"\x00" * 64, CONFIG, "tensors"),
        (_tensors()[:-4], CONFIG, "tensors"),
        (_tensors(rows=4), CONFIG, "tensors"),
        (_tensors(), CONFIG | {"num_virtual_tokens": 0}, "config"),
        (_tensors(), CONFIG | {"peft_type": "IA3"}, "config"),
        (_tensors(), CONFIG | {"nonsense": 1}, "config"),
        (_tensors(), CONFIG | {"token_dim": 16}, "config"),
    ],
)
async def test_what_is_no_adapter_is_422_with_its_field(
    stack: Any, tensors: bytes, config: Any, field: str
) -> None:
    response = await _upload(stack, "bad", tensors, config)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == "adapter_invalid"
    assert error["param"].startswith(field)
    assert await stack.listed() == [stack.base]


async def test_a_version_is_promoted_rolled_back_and_kept(stack: Any) -> None:
    digests = [(await _upload(stack, "loud", _tensors(seed))).json()["digest"] for seed in (1, 2)]

    async def used(model: str) -> str:
        return str((await stack.complete("hi", model=model)).headers["x-softprompt-adapter-digest"])

    prod = "/v1/adapters/loud/aliases/prod"
    assert (await stack.http.put(prod, json={"version": 1, "expected_version": 0})).json()["aliases"] == ["prod"]
    assert [await used(model) for model in ("loud@prod", "loud")] == digests
    assert (await stack.http.put(prod, json={"version": 2, "expected_version": 0})).status_code == 409
    rolled_back = await stack.http.put("/v1/adapters/loud/aliases/latest", json={"version": 1})
    assert rolled_back.json()["aliases"] == ["latest", "prod"]
    assert await used("loud") == digests[0]

    refused = await stack.http.delete("/v1/adapters/loud@1")
    assert refused.status_code == 409
    assert "the alias prod points to loud@1" in refused.json()["error"]["message"]
    assert (await stack.http.delete(prod)).status_code == 200
    assert (await stack.http.delete(prod)).json()["error"]["code"] == "adapter_not_found"
    labelled = await stack.http.patch("/v1/adapters/loud@1", json={"labels": {"team": "x"}, "pinned": True})
    assert (labelled.json()["labels"], labelled.json()["pinned"]) == ({"team": "x"}, True)
    for path in ("loud@1", "loud"):
        assert "loud@1 is pinned" in (await stack.http.delete(f"/v1/adapters/{path}")).json()["error"]["message"]
    await stack.http.patch("/v1/adapters/loud", json={"pinned": False})
    assert (await stack.http.delete("/v1/adapters/loud")).json()["deleted_versions"] == 2


@pytest.mark.parametrize("registry_settings", [{"lease_s": 60}])
async def test_under_a_lease_what_was_acknowledged_answers_and_nobody_is_asked(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [(await _upload(stack, "loud", _tensors(seed))).json()["digest"] for seed in (1, 2)]
    asked: list[str] = []
    get_adapter = RegistryClient.get_adapter

    async def ask(self: RegistryClient, spelling: str) -> Any:
        asked.append(spelling)
        return await get_adapter(self, spelling)

    monkeypatch.setattr(RegistryClient, "get_adapter", ask)

    async def used() -> str:
        return str((await stack.complete("hi", model="loud")).headers["x-softprompt-adapter-digest"])

    async with asyncio.timeout(10):
        num_asked = -1
        while len(asked) != num_asked:  # until the lease is held
            num_asked = len(asked)
            assert await used() == digests[1]
    asked.clear()
    for number in [1, 2] * 10:
        await stack.http.put("/v1/adapters/loud/aliases/latest", json={"version": number})
        assert await used() == digests[number - 1]
    newer = (await _upload(stack, "loud", _tensors(3))).json()["digest"]
    assert await used() == newer
    assert asked == []
    assert (await stack.http.delete("/v1/adapters/loud")).status_code == 200
    assert (await stack.complete("hi", model="loud")).status_code == 404


async def test_a_request_that_runs_ends_with_its_adapter_though_it_was_deleted(stack: Any) -> None:
    digest = (await _upload(stack, "loud", _tensors())).json()["digest"]
    running = asyncio.create_task(stack.complete("wait", model="loud"))
    await stack.inference.until(lambda fake: fake.running)
    assert (await stack.http.delete("/v1/adapters/loud")).status_code == 200
    for model in ("loud", "loud@1", "loud@latest", digest):
        refused = await stack.complete("hi", model=model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    stack.inference.released.set()
    answer = await running
    assert (answer.status_code, answer.headers["x-softprompt-adapter-digest"]) == (200, digest)


async def test_without_its_store_known_adapters_are_served_and_nothing_is_changed(stack: Any, store: Any) -> None:
    digest = (await _upload(stack, "loud", _tensors())).json()["digest"]
    await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1})
    await store.kill()
    for model in ("loud", "loud@1", "loud@prod", digest):
        answer = await stack.complete("hi", model=model)
        assert (answer.status_code, answer.headers["x-softprompt-adapter-digest"]) == (200, digest)
    for refused in (
        await _upload(stack, "more", _tensors(2)),
        await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1}),
        await stack.http.patch("/v1/adapters/loud", json={"pinned": True}),
        await stack.http.delete("/v1/adapters/loud"),
        await stack.complete("hi", model="unheard-of"),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers

    await store.start()
    async with asyncio.timeout(10):
        while (await _upload(stack, "more", _tensors(2))).status_code != 201:
            pass
    assert (await stack.complete("hi", model="more")).status_code == 200
    assert (await stack.complete("hi", model="loud@prod")).headers["x-softprompt-adapter-digest"] == digest


async def test_a_reserved_name_is_refused(stack: Any) -> None:
    response = await _upload(stack, "latest", _tensors())
    assert response.status_code == 400


async def test_an_unknown_name_comes_with_a_near_one(stack: Any) -> None:
    await _upload(stack, "tweet_adapter", _tensors())
    response = await stack.complete("hi", model="tweet_adaptor")
    assert "did you mean 'tweet_adapter'?" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("source", "flag"), [("file:///srv/loud", "--allow-file-imports"), ("hf://a/b", "--allow-hub-imports")]
)
async def test_imports_are_refused_where_no_flag_allows_them(stack: Any, source: str, flag: str) -> None:
    refused = await stack.post("/v1/adapters", name="loud", source=source)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "source")
    assert flag in refused.json()["error"]["message"]


@pytest.fixture
async def registry(registry_address: str) -> AsyncIterator[RegistryServiceStub]:
    async with open_channel(registry_address) as channel:
        yield RegistryServiceStub(channel)


async def _lease_of_another(registry: RegistryServiceStub) -> Any:
    """A gateway's that hangs: until its lease is over, changes are made and not acknowledged."""
    call = registry.HoldLease()
    async with asyncio.timeout(10):
        while True:
            cursor = (await registry.ListAdapters(reg.ListAdaptersRequest())).cursor
            await call.write(reg.HoldLeaseRequest(cursor=cursor))
            if (await call.read()).lease_ms:
                return call


@pytest.mark.parametrize("model", ["loud@prod", "fresh"])
async def test_what_was_taken_back_before_its_answer_came_is_gone(
    stack: Any, registry: RegistryServiceStub, model: str
) -> None:
    await _upload(stack, "loud", _tensors(1))
    hanging = await _lease_of_another(registry)
    if model == "loud@prod":
        change = asyncio.create_task(stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1}))
    else:
        change = asyncio.create_task(_upload(stack, "fresh", _tensors(2)))
    async with asyncio.timeout(10):
        while (await stack.complete("hi", model=model)).status_code != 200:
            pass
    assert not change.done()
    if model == "loud@prod":
        await registry.SetAlias(reg.SetAliasRequest(name="loud", alias="prod"))
    else:
        await registry.DeleteAdapter(reg.DeleteAdapterRequest(name="fresh"))
    assert (await change).is_success
    hanging.cancel()
    for _ in range(20):
        assert (await stack.complete("hi", model=model)).status_code == 404
    assert await stack.listed() == [stack.base, "loud"]
