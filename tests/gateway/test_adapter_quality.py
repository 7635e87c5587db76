"""What is told of an adapter's quality over HTTP: norms, effects, nearest tokens, warnings; and imports."""

import asyncio
import base64
from typing import Any

import pytest
from softprompt_api import errors
from softprompt_api.access import Scope
from softprompt_api.registry.v1 import registry_pb2 as reg

BODY = {
    "name": "loud",
    "config": {"peft_type": "PROMPT_TUNING"},
    "tensors_base64": base64.b64encode(b"x").decode(),
}
PROBE = {
    "base_model": "acme/tiny-1",
    "dtype": "float32",
    "probed_at": 5,
    "effects": [{"task": None, "mean_kl": 0.5, "max_kl": 1.0, "num_flips": 2, "num_prompts": 8}],
}


async def until_probed(stack: Any, *spellings: str) -> None:
    await stack.inference.until(lambda fake: fake.probed == list(spellings))


async def test_what_was_registered_is_probed_without_anybody_waiting_for_it(stack: Any) -> None:
    response = await stack.post("/v1/adapters", **BODY)
    assert response.status_code == 201
    assert response.json()["probe"] is None
    await until_probed(stack, "loud@1")
    assert stack.inference.patience_ms == [30_000], "others are served first"
    async with asyncio.timeout(5):
        while (await stack.http.get("/v1/adapters/loud")).json()["probe"] != PROBE:
            pass


@pytest.mark.parametrize("error", [errors.Unavailable("loading"), errors.AdapterInvalid("it does not fit")])
async def test_a_registration_stands_where_its_probe_fails(stack: Any, error: Exception) -> None:
    stack.inference.probe_error = error
    for name in ("one", "two"):
        assert (await stack.post("/v1/adapters", **BODY | {"name": name})).status_code == 201
    await until_probed(stack, "one@1", "two@1")
    assert (await stack.http.get("/v1/adapters/one")).json()["probe"] is None


async def test_a_registration_needs_no_inference_service(stack: Any) -> None:
    await stack.services["inference"].stop(0)
    response = await stack.post("/v1/adapters", **BODY)
    assert (response.status_code, response.json()["model"]) == (201, "loud@1")


async def test_an_adapter_is_probed_on_demand(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.registry.add("loud")
    response = await stack.http.post("/v1/adapters/loud@1/probe")
    assert response.status_code == 200, response.text
    assert (response.json()["model"], response.json()["probe"]) == ("loud@1", PROBE)
    assert (stack.inference.probed, stack.inference.patience_ms) == (["loud@1"], [0])


async def test_norms_and_warnings_are_shown_with_a_version(stack: Any) -> None:
    await stack.registry.add("loud")
    shown = (await stack.http.get("/v1/adapters/loud")).json()
    assert (shown["row_norms"], shown["vocabulary_norms"], shown["warnings"]) == (None, None, [])
    version = stack.registry.versions["loud"][1]
    version.row_norms.CopyFrom(reg.Norms(low=1, median=2, high=3))
    version.base_model.vocabulary_norms.CopyFrom(reg.Norms(low=4, median=5, high=6))
    version.warnings.append("trained on another")
    version.probe.CopyFrom(reg.Probe(effects=[reg.Effect(num_prompts=8)], base_model_id="b", dtype="bfloat16"))
    shown = (await stack.http.get("/v1/adapters/loud")).json()
    assert shown["row_norms"] == {"low": 1, "median": 2, "high": 3}
    assert shown["vocabulary_norms"] == {"low": 4, "median": 5, "high": 6}
    first, second = shown["warnings"]
    assert first == "trained on another"
    assert second.startswith("the adapter changes next to nothing")
    listed = (await stack.http.get("/v1/adapters")).json()["data"]
    assert listed[0]["warnings"] == shown["warnings"]


async def test_nearest_tokens_are_listed(stack: Any) -> None:
    version = await stack.registry.add("loud", virtual_tokens=2)
    answer = (await stack.http.get("/v1/adapters/loud/nearest-tokens", params={"top_k": 2})).json()
    tokens = [
        {"token_id": 65, "token": "A", "cosine": 0.5},
        {"token_id": 66, "token": "B", "cosine": 0.5},
    ]
    assert answer == {
        "object": "adapter.nearest_tokens",
        "model": "loud@1",
        "digest": version.digest,
        "data": [{"index": index, "norm": 2.0, "tokens": tokens} for index in range(2)],
    }
    answer = (await stack.http.get("/v1/adapters/loud@1/nearest-tokens")).json()
    assert len(answer["data"][0]["tokens"]) == 5


@pytest.mark.parametrize("path", ["nothing/probe", "nothing@3/probe", "nothing/nearest-tokens"])
async def test_what_is_not_there_is_not_found(stack: Any, path: str) -> None:
    method = "POST" if path.endswith("probe") else "GET"
    response = await stack.http.request(method, f"/v1/adapters/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("POST", "Loud/probe", "adapter"),
        ("GET", "Loud/nearest-tokens", "adapter"),
        ("GET", "loud/nearest-tokens?top_k=0", "top_k"),
        ("GET", "loud/nearest-tokens?top_k=21", "top_k"),
        ("GET", "loud/nearest-tokens?top_k=x", "top_k"),
    ],
)
async def test_a_bad_question_is_refused_by_field(stack: Any, method: str, path: str, param: str) -> None:
    await stack.registry.add("loud")
    response = await stack.http.request(method, f"/v1/adapters/{path}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_without_an_inference_service_nothing_is_measured(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.services["inference"].stop(0)
    assert (await stack.http.post("/v1/adapters/loud/probe")).status_code == 503
    assert (await stack.http.get("/v1/adapters/loud/nearest-tokens")).status_code == 503


async def test_a_source_is_imported_by_the_registry_and_probed(stack: Any) -> None:
    response = await stack.post(
        "/v1/adapters",
        name="loud",
        source="file:///srv/loud",
        labels={"team": "x"},
        idempotency_key="once",
        base_model=stack.base,
    )
    assert response.status_code == 201, response.text
    assert (response.json()["model"], response.json()["warnings"]) == ("loud@1", ["small"])
    [request] = stack.registry.imports
    assert (request.name, request.source, dict(request.labels)) == ("loud", "file:///srv/loud", {"team": "x"})
    assert (request.idempotency_key, request.base_model_id) == ("once", stack.base)
    assert await stack.listed() == [stack.base, "loud"]
    await until_probed(stack, "loud@1")


async def test_a_source_that_is_not_allowed_is_refused_with_the_flag(stack: Any) -> None:
    response = await stack.post("/v1/adapters", name="loud", source="hf://somebody/loud")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "source")
    assert "--allow-hub-imports" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": None}, "name"),
        ({"source": 5}, "source"),
        ({"source": None}, "source"),
        ({"source": "x" * 2049}, "source"),
        ({"config": {}}, "config"),
        ({"tensors_base64": ""}, "tensors_base64"),
        ({"labels": {"a": 1}}, "labels.a"),
    ],
)
async def test_a_bad_import_is_refused_by_field(stack: Any, fields: Any, param: str) -> None:
    response = await stack.post("/v1/adapters", **{"name": "loud", "source": "file:///srv/loud"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not stack.registry.imports


@pytest.mark.parametrize("gateway_settings", [{"require_keys": True}])
async def test_a_tenant_measures_and_imports_by_its_own_names(stack: Any, logged: list[Any]) -> None:
    key = await stack.registry.keys.make(Scope.ADMIN, tenant="acme")
    stack.http.headers["authorization"] = f"Bearer {key}"
    imported = await stack.post("/v1/adapters", name="loud", source="file:///srv/loud")
    assert (imported.status_code, imported.json()["model"]) == (201, "loud@1")
    assert [request.name for request in stack.registry.imports] == ["acme/loud"]
    await until_probed(stack, "acme/loud@1")
    for spelling in ("loud", imported.json()["digest"]):
        probed = await stack.http.post(f"/v1/adapters/{spelling}/probe")
        assert (probed.json()["model"], probed.json()["probe"]) == ("loud@1", PROBE)
        near = await stack.http.get(f"/v1/adapters/{spelling}/nearest-tokens")
        assert (near.json()["model"], len(near.json()["data"])) == ("loud@1", 5)
    assert stack.inference.probed == ["acme/loud@1"] * 3
    lines = [line for line in logged if line["event"] == "audit"]
    assert [(line["action"], line["tenant"], line["outcome"]) for line in lines] == [
        ("adapter.import", "acme", "done"),
        ("adapter.probe", "acme", "done"),
        ("adapter.probe", "acme", "done"),
    ]


@pytest.mark.parametrize("gateway_settings", [{"require_keys": True}])
@pytest.mark.parametrize(("method", "path"), [("POST", "probe"), ("GET", "nearest-tokens")])
async def test_a_key_for_other_adapters_measures_nothing(stack: Any, method: str, path: str) -> None:
    digest = (await stack.registry.add("loud")).digest
    key = await stack.registry.keys.make(Scope.ADMIN, adapters=["quiet"])
    denied, unknown = (403, "permission_denied"), (404, "adapter_not_found")
    for spelling, refused in (("loud", denied), ("loud@1", denied), (digest, unknown)):
        response = await stack.http.request(
            method, f"/v1/adapters/{spelling}/{path}", headers={"authorization": f"Bearer {key}"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == refused
    assert not stack.inference.probed
