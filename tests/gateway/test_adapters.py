"""/v1/adapters: registering, listing, describing and deleting over HTTP."""

import asyncio
import base64
import hashlib
import json
from typing import Any

import pytest
from softprompt_api import errors
from softprompt_api.registry.v1 import registry_pb2 as reg

CONFIG = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}
TENSORS = bytes(range(256)) * 40


def _body(**fields: Any) -> dict[str, Any]:
    tensors = base64.b64encode(TENSORS).decode()
    return {"name": "loud", "config": CONFIG, "tensors_base64": tensors} | fields


def _upload_headers(tensors: bytes = TENSORS, **headers: str) -> dict[str, str]:
    return {
        "content-type": "application/octet-stream",
        "x-adapter-config": base64.b64encode(json.dumps(CONFIG).encode()).decode(),
        "x-adapter-sha256": hashlib.sha256(tensors).hexdigest(),
    } | headers


@pytest.mark.parametrize("config", [CONFIG, json.dumps(CONFIG)])
async def test_an_adapter_is_registered_from_json_and_used_by_the_next_request(stack: Any, config: Any) -> None:
    body = _body(config=config, labels={"team": "x"}, idempotency_key="once", base_model=stack.base)
    response = await stack.post("/v1/adapters", **body, sha256=hashlib.sha256(TENSORS).hexdigest())
    assert response.status_code == 201, response.text
    assert (response.json()["model"], response.json()["warnings"]) == ("loud@1", ["small"])
    header = stack.registry.headers[-1]
    assert json.loads(header.config_json) == CONFIG
    assert dict(header.labels) == {"team": "x"}
    assert (header.idempotency_key, header.base_model_id) == ("once", stack.base)
    assert await stack.listed() == [stack.base, "loud"]
    assert (await stack.complete("hi", model="loud")).json()["choices"][0]["text"] == "HI"


async def test_a_tensor_file_is_uploaded_as_it_is(stack: Any) -> None:
    tensors = TENSORS * 300
    labels = base64.b64encode(b'{"team": "x"}').decode()
    response = await stack.http.post(
        "/v1/adapters/loud",
        content=tensors,
        headers=_upload_headers(
            tensors, **{"x-adapter-labels": labels, "idempotency-key": "once", "x-adapter-base-model": stack.base}
        ),
    )
    assert response.status_code == 201, response.text
    assert response.json()["name"] == "loud"
    assert stack.registry.uploads == [[2**20, 2**20, len(tensors) - 2 * 2**20]]
    header = stack.registry.headers[-1]
    assert json.loads(header.config_json) == CONFIG
    assert dict(header.labels) == {"team": "x"}
    assert (header.idempotency_key, header.base_model_id) == ("once", stack.base)


async def test_an_adapter_is_for_the_base_model_that_is_served_where_nothing_is_said(stack: Any) -> None:
    await stack.post("/v1/adapters", **_body())
    await stack.http.post("/v1/adapters/loud", content=TENSORS, headers=_upload_headers())
    assert [header.base_model_id for header in stack.registry.headers] == [stack.base] * 2
    await stack.post("/v1/adapters", name="other", source="file:///srv/other")
    await stack.post("/v1/load_lora_adapter", lora_name="third", lora_path="/srv/third")
    assert [request.base_model_id for request in stack.registry.imports] == [stack.base] * 2


async def test_an_invalid_adapter_is_422_with_its_field(stack: Any) -> None:
    response = await stack.post("/v1/adapters", **_body(config={"peft_type": "EXPLODE"}))
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "adapter_invalid"
    assert response.json()["error"]["param"] == "config.peft_type"


async def test_a_large_upload_that_is_refused_early_still_gets_its_answer(stack: Any) -> None:
    tensors = TENSORS * 800
    config = base64.b64encode(b'{"peft_type": "EXPLODE"}').decode()
    response = await stack.http.post(
        "/v1/adapters/loud", content=tensors, headers=_upload_headers(tensors, **{"x-adapter-config": config})
    )
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "config.peft_type"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"name": None}, 400, "name"),
        ({"config": 5}, 400, "config"),
        ({"config": None}, 400, "config"),
        ({"tensors_base64": "?"}, 400, "tensors_base64"),
        ({"tensors_base64": "é"}, 400, "tensors_base64"),
        ({"sha256": "0" * 64}, 422, "sha256"),
        ({"sha256": "x"}, 400, "sha256"),
        ({"labels": {"a": 1}}, 400, "labels.a"),
        ({"labels": []}, 400, "labels"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"idempotency_key": "x" * 200}, 400, "idempotency_key"),
    ],
)
async def test_a_bad_registration_is_refused_by_field(stack: Any, fields: Any, status: int, param: str) -> None:
    response = await stack.post("/v1/adapters", **_body(**fields))
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert not stack.registry.headers


@pytest.mark.parametrize(
    ("name", "headers", "status", "param"),
    [
        ("Loud", {}, 400, "adapter"),
        ("loud@1", {}, 400, "adapter"),
        ("sha256:" + "0" * 64, {}, 400, "adapter"),
        ("loud", {"x-adapter-config": "?"}, 400, "x-adapter-config"),
        ("loud", {"x-adapter-config": "//8="}, 400, "x-adapter-config"),
        ("loud", {"x-adapter-sha256": "ABC"}, 400, "x-adapter-sha256"),
        ("loud", {"x-adapter-labels": "W10="}, 400, None),
        ("loud", {"x-adapter-labels": "eyJhIjogMX0="}, 400, "labels.a"),
        ("loud", {"content-type": "application/json"}, 415, None),
        ("loud", {"content-encoding": "gzip"}, 415, None),
        ("loud", {"x-adapter-sha256": "0" * 64}, 422, "tensors"),
    ],
)
async def test_a_bad_upload_is_refused_by_header(
    stack: Any, name: str, headers: dict[str, str], status: int, param: str | None
) -> None:
    response = await stack.http.post(f"/v1/adapters/{name}", content=TENSORS, headers=_upload_headers() | headers)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert not stack.registry.versions


@pytest.mark.parametrize("missing", ["x-adapter-config", "x-adapter-sha256"])
async def test_a_missing_upload_header_is_named(stack: Any, missing: str) -> None:
    headers = _upload_headers()
    del headers[missing]
    error = (await stack.http.post("/v1/adapters/loud", content=TENSORS, headers=headers)).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", missing)


async def test_an_upload_of_unknown_size_is_refused(stack: Any) -> None:
    async def pieces() -> Any:
        yield TENSORS

    response = await stack.http.post("/v1/adapters/loud", content=pieces(), headers=_upload_headers())
    assert response.status_code == 411


@pytest.mark.parametrize("gateway_settings", [{"upload_timeout_s": 1.0, "registry_timeout_s": 0.3}])
async def test_an_upload_that_the_registry_does_not_read_is_answered(stack: Any) -> None:
    stack.registry.reads.clear()
    tensors = bytes(8 * 2**20)
    response = await stack.http.post("/v1/adapters/loud", content=tensors, headers=_upload_headers(tensors))
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("gateway_settings", [{"upload_timeout_s": 0.3}])
async def test_an_upload_that_does_not_come_is_not_waited_for(stack: Any) -> None:
    head = [f"{name}: {value}" for name, value in _upload_headers().items()]
    head = ["POST /v1/adapters/loud HTTP/1.1", "host: localhost", f"content-length: {len(TENSORS)}", *head]
    reader, writer = await stack.connect("\r\n".join([*head, "", "x"]).encode())
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in answer
    writer.close()


@pytest.mark.parametrize("gateway_settings", [{"max_upload_bytes": 2000}])
async def test_an_upload_over_the_limit_is_refused(stack: Any) -> None:
    response = await stack.http.post("/v1/adapters/loud", content=TENSORS, headers=_upload_headers())
    assert response.status_code == 413


async def test_an_upload_whose_client_leaves_registers_nothing(stack: Any) -> None:
    head = ["POST /v1/adapters/loud HTTP/1.1", "host: localhost", "content-length: 5000000"]
    head += [f"{name}: {value}" for name, value in _upload_headers().items()]
    _, writer = await stack.connect("\r\n".join(head).encode() + b"\r\n\r\n" + TENSORS * 150)
    async with asyncio.timeout(5):
        while not stack.registry.uploads:
            await stack.http.get("/health/live")
    writer.close()
    async with asyncio.timeout(5):
        while not stack.registry.cut_uploads:
            await stack.http.get("/health/live")
    assert not stack.registry.versions


async def test_adapters_are_listed_in_pages(stack: Any) -> None:
    for name in ("a1", "a2", "a3", "b1"):
        await stack.registry.add(name)
    first = (await stack.http.get("/v1/adapters", params={"page_size": 2, "prefix": "a"})).json()
    assert [adapter["name"] for adapter in first["data"]] == ["a1", "a2"]
    assert first["total_size"] == 3
    token = first["next_page_token"]
    second = (
        await stack.http.get("/v1/adapters", params={"page_size": 2, "prefix": "a", "page_token": token})
    ).json()
    assert [adapter["name"] for adapter in second["data"]] == ["a3"]
    assert second["next_page_token"] is None


@pytest.mark.parametrize(
    ("params", "param"),
    [({"page_size": 0}, "page_size"), ({"page_size": "x"}, "page_size"), ({"page_token": "x"}, "page_token")],
)
async def test_a_bad_page_is_refused(stack: Any, params: Any, param: str) -> None:
    response = await stack.http.get("/v1/adapters", params=params)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_one_version_is_described(stack: Any) -> None:
    first = await stack.registry.add("loud")
    await stack.registry.add("loud")
    for spelling in ("loud@1", first.digest):
        shown = (await stack.http.get(f"/v1/adapters/{spelling}")).json()
        assert (shown["version"], shown["config_json"]) == (1, '{"peft_type": "PROMPT_TUNING"}')
    assert (await stack.http.get("/v1/adapters/loud")).json()["version"] == 2


async def test_versions_are_listed_newest_first(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.registry.add("loud")
    versions = (await stack.http.get("/v1/adapters/loud/versions")).json()["data"]
    assert [version["version"] for version in versions] == [2, 1]


async def test_one_version_is_deleted(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.registry.add("loud")
    deleted = (await stack.http.delete("/v1/adapters/loud@2")).json()
    assert deleted == {"object": "adapter.deleted", "id": "loud@2", "deleted": True, "deleted_versions": 1}
    assert (await stack.complete("hi", model="loud")).headers["x-softprompt-adapter"] == "loud@1"
    await stack.until_listed("loud")


async def test_a_name_is_deleted_with_all_versions(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.registry.add("loud")
    assert (await stack.http.delete("/v1/adapters/loud")).json()["deleted_versions"] == 2
    assert (await stack.complete("hi", model="loud")).status_code == 404
    assert await stack.listed() == [stack.base]


async def test_an_alias_is_set_used_moved_and_removed(stack: Any) -> None:
    first = await stack.registry.add("loud")
    await stack.registry.add("loud")
    made = await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1})
    assert made.status_code == 200, made.text
    assert (made.json()["model"], made.json()["aliases"]) == ("loud@1", ["prod"])
    used = await stack.complete("hi", model="loud@prod")
    assert used.headers["x-softprompt-adapter"] == "loud@1"
    assert used.headers["x-softprompt-adapter-digest"] == first.digest
    assert (await stack.http.get("/v1/adapters/loud@prod")).json()["version"] == 1

    await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 2, "expected_version": 1})
    assert (await stack.complete("hi", model="loud@prod")).headers["x-softprompt-adapter"] == "loud@2"
    expected = [
        request.expected_version if request.HasField("expected_version") else None
        for request in stack.registry.alias_requests
    ]
    assert expected == [None, 1]

    removed = (await stack.http.delete("/v1/adapters/loud/aliases/prod")).json()
    assert removed == {"object": "alias.deleted", "id": "loud@prod", "deleted": True}
    assert (await stack.complete("hi", model="loud@prod")).status_code == 404


async def test_a_rollback_is_listed_at_once(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.registry.add("loud")
    await stack.http.put("/v1/adapters/loud/aliases/latest", json={"version": 1})
    cards = (await stack.http.get("/v1/models")).json()["data"]
    assert [card["root"] for card in cards[1:]] == ["loud@1"]
    assert (await stack.complete("hi", model="loud")).headers["x-softprompt-adapter"] == "loud@1"
    versions = (await stack.http.get("/v1/adapters/loud/versions")).json()["data"]
    assert [(version["version"], version["aliases"]) for version in versions] == [(2, []), (1, ["latest"])]


async def test_an_alias_that_another_client_moved_is_known_while_the_registry_is_away(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.until_listed("loud")
    await stack.http.put("/v1/adapters/loud/aliases/prod", json={"version": 1})
    await stack.registry.add("loud")
    await stack.registry.SetAlias(reg.SetAliasRequest(name="loud", alias="prod", version=2), None)
    await stack.registry.add("mark")
    await stack.until_listed("loud", "mark")  # events come in order
    await stack.services["registry"].stop(0)
    assert (await stack.complete("hi", model="loud@prod")).headers["x-softprompt-adapter"] == "loud@2"


async def test_labels_and_pin_are_changed(stack: Any) -> None:
    await stack.registry.add("loud")
    changed = await stack.http.patch(
        "/v1/adapters/loud@latest", json={"labels": {"team": "x", "old": None}, "pinned": True}
    )
    assert changed.status_code == 200, changed.text
    assert (changed.json()["labels"], changed.json()["pinned"]) == ({"team": "x"}, True)
    [update] = stack.registry.updates
    assert (update.adapter, list(update.update_mask.paths)) == ("loud", ["labels.team", "labels.old", "pinned"])
    await stack.http.patch("/v1/adapters/loud@1", json={"labels": {"a": "b"}})
    assert list(stack.registry.updates[-1].update_mask.paths) == ["labels.a"]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("PATCH", "loud", {}, "labels"),
        ("PATCH", "loud", {"labels": {}}, "labels"),
        ("PATCH", "loud", {"labels": {"a": 1}}, "labels.a"),
        ("PATCH", "loud", {"pinned": "yes"}, "pinned"),
        ("PATCH", "loud", {"digest": "x"}, "digest"),
        ("PATCH", "Loud", {"pinned": True}, "adapter"),
        ("PUT", "loud/aliases/prod", {}, "version"),
        ("PUT", "loud/aliases/prod", {"version": "1"}, "version"),
        ("PUT", "loud/aliases/prod", {"version": 0}, "version"),
        ("PUT", "loud/aliases/prod", {"version": 2**31}, "version"),
        ("PUT", "loud/aliases/prod", {"version": 1, "expected_version": -1}, "expected_version"),
        ("PUT", "loud@1/aliases/prod", {"version": 1}, "adapter"),
        ("DELETE", "loud@1/aliases/prod", None, "adapter"),
    ],
)
async def test_a_bad_change_is_refused_by_field(stack: Any, method: str, path: str, body: Any, param: str) -> None:
    await stack.registry.add("loud")
    response = await stack.http.request(method, f"/v1/adapters/{path}", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not stack.registry.updates
    assert not stack.registry.alias_requests


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("adapter", ["nothing", "nothing@3"])
async def test_what_is_not_there_is_not_found(stack: Any, method: str, adapter: str) -> None:
    response = await stack.http.request(method, f"/v1/adapters/{adapter}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"


@pytest.mark.parametrize("adapter", ["loud@latest", "sha256:" + "0" * 64, "%2e%2e%2fx", "a%00b"])
async def test_only_names_and_numbers_are_deleted(stack: Any, adapter: str) -> None:
    assert (await stack.http.delete(f"/v1/adapters/{adapter}")).status_code in (400, 404)


@pytest.mark.parametrize("leaf", [errors.AdapterInUse, errors.AliasMoved])
async def test_what_stands_in_the_way_of_a_change_is_a_conflict(stack: Any, leaf: Any) -> None:
    await stack.registry.add("loud")
    stack.registry.error = leaf("loud@1 is pinned; lift the pin first", field="adapter")
    for method, path, body in (
        ("DELETE", "loud", None),
        ("DELETE", "loud@1", None),
        ("PUT", "loud/aliases/prod", {"version": 1}),
    ):
        response = await stack.http.request(method, f"/v1/adapters/{path}", json=body)
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "adapter_conflict"
        assert "lift the pin" in response.json()["error"]["message"]


async def test_a_conflict_is_told(stack: Any) -> None:
    stack.registry.error = errors.AdapterConflict("the key was used for other content", field="idempotency_key")
    response = await stack.post("/v1/adapters", **_body())
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "adapter_conflict"


async def test_without_a_registry_nothing_is_registered(stack: Any) -> None:
    await stack.services["registry"].stop(0)
    assert (await stack.post("/v1/adapters", **_body())).status_code == 503
    upload = await stack.http.post("/v1/adapters/loud", content=TENSORS, headers=_upload_headers())
    assert upload.status_code == 503


async def test_what_is_in_memory_is_listed_with_its_tier_and_use(stack: Any) -> None:
    answer = (await stack.http.get("/v1/resident_adapters?limit=2")).json()
    assert answer["total_size"] == 3
    assert [one["model"] for one in answer["data"]] == ["loud@1", "loud@2"]
    assert answer["data"][0] == {
        "object": "resident_adapter",
        "replica": stack.replica_name(0),
        "model": "loud@1",
        "digest": f"sha256:{1:064x}",
        "tier": "device",
        "size_bytes": 200,
        "num_virtual_tokens": 5,
        "idle_s": 1.235,
        "hits": 7,
        "in_use": 1,
        "pinned": False,
    }
    assert answer["data"][1]["pinned"]
    assert len((await stack.http.get("/v1/resident_adapters")).json()["data"]) == 3
    assert (await stack.http.get("/v1/resident_adapters?limit=0")).status_code == 400
