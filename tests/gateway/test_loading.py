"""Routes under which scripts written for vLLM and Aphrodite load and unload adapters."""

from typing import Any

import pytest
from softprompt_api import errors
from softprompt_gateway.adapters.loading import source_of

PAIRS = pytest.mark.parametrize(
    ("what", "word", "told"), [("lora", "lora", "LoRA adapter"), ("prompt", "prompt_adapter", "prompt adapter")]
)


@PAIRS
async def test_what_a_script_loads_from_a_path_is_served_until_it_unloads_it(
    stack: Any, what: str, word: str, told: str
) -> None:
    body = {f"{word}_name": "loud", f"{word}_path": "/srv/my adapters/loud"}
    answer = await stack.post(f"/v1/load_{what}_adapter", **body)
    assert (answer.status_code, answer.text) == (200, f"Success: {told} 'loud' added successfully.")
    assert stack.registry.imports[-1].source == "file:///srv/my%20adapters/loud"
    assert (await stack.complete("hi", model="loud")).json()["choices"][0]["text"] == "HI"
    assert "loud" in await stack.listed()
    gone = await stack.post(f"/v1/unload_{what}_adapter", **{f"{word}_name": "loud"})
    assert (gone.status_code, gone.text) == (200, f"Success: {told} 'loud' removed successfully.")
    assert (await stack.complete("hi", model="loud")).status_code == 404
    assert "loud" not in await stack.listed()


@PAIRS
async def test_a_name_that_is_loaded_is_loaded_again_only_in_place(
    stack: Any, what: str, word: str, told: str
) -> None:
    await stack.registry.add("loud")
    body = {f"{word}_name": "loud", f"{word}_path": "/srv/loud"}
    for fields in (body, {**body, "load_inplace": False}):
        refused = (await stack.post(f"/v1/load_{what}_adapter", **fields)).json()["error"]
        assert (refused["code"], refused["param"]) == ("invalid_value", f"{word}_name")
        assert "has already been loaded" in refused["message"]
    assert not stack.registry.imports
    assert (await stack.post(f"/v1/load_{what}_adapter", **body, load_inplace=True)).status_code == 200
    assert (await stack.complete("hi", model="loud")).headers["x-softprompt-adapter"] == "loud@2"


@PAIRS
async def test_what_is_not_loaded_is_not_found(stack: Any, what: str, word: str, told: str) -> None:
    refused = await stack.post(f"/v1/unload_{what}_adapter", **{f"{word}_name": "loud"})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "adapter_not_found"
    assert refused.json()["error"]["param"] == f"{word}_name"


@PAIRS
async def test_where_no_flag_allows_an_import_the_answer_names_it(
    stack: Any, what: str, word: str, told: str
) -> None:
    body = {f"{word}_name": "loud", f"{word}_path": "owner/loud"}
    refused = (await stack.post(f"/v1/load_{what}_adapter", **body)).json()["error"]
    assert (refused["code"], refused["param"]) == ("unsupported_parameter", f"{word}_path")
    assert "--allow-hub-imports" in refused["message"]


@PAIRS
@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"name": "loud"}, "missing_required_parameter"),
        ({"path": "/srv/loud"}, "missing_required_parameter"),
        ({"name": "loud", "path": "loud"}, "invalid_value"),
        ({"name": "loud", "path": "./a/loud"}, "invalid_value"),
        ({"name": "Loud!", "path": "/srv/loud"}, "invalid_value"),
        ({"name": "x/y", "path": "/srv/loud"}, "invalid_value"),
        ({"name": 5, "path": "/srv/loud"}, "invalid_value"),
        ({"name": "loud", "path": "/srv/loud", "rank": 8}, "unknown_parameter"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    stack: Any, what: str, word: str, told: str, fields: dict[str, Any], code: str
) -> None:
    body = {name if name == "rank" else f"{word}_{name}": value for name, value in fields.items()}
    refused = await stack.post(f"/v1/load_{what}_adapter", **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == code
    assert not stack.registry.imports


@pytest.mark.parametrize("name", ["loud@1", "loud@prod", "sha256:" + "0" * 64])
async def test_a_name_is_unloaded_and_no_version_of_it(stack: Any, name: str) -> None:
    await stack.registry.add("loud")
    assert (await stack.post("/v1/unload_lora_adapter", lora_name=name)).status_code == 400
    assert (await stack.complete("hi", model="loud")).status_code == 200


async def test_what_stands_in_the_way_is_a_conflict(stack: Any) -> None:
    await stack.registry.add("loud")
    stack.registry.error = errors.AdapterInUse("loud@1 is pinned; lift the pin first", field="adapter")
    refused = await stack.post("/v1/unload_lora_adapter", lora_name="loud", lora_int_id=7)
    assert refused.status_code == 409


async def test_loads_and_unloads_are_audited(stack: Any, logged: list[Any]) -> None:
    await stack.post("/v1/load_lora_adapter", lora_name="loud", lora_path="/srv/loud")
    await stack.post("/v1/unload_lora_adapter", lora_name="loud")
    lines = [line for line in logged if line["event"] == "audit"]
    assert [(line["action"], line["outcome"]) for line in lines] == [
        ("adapter.import", "done"),
        ("adapter.delete", "done"),
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/srv/a b", "file:///srv/a%20b"),
        ("owner/name", "hf://owner/name"),
        ("owner/name@v1", "hf://owner/name@v1"),
        ("hf://owner/name", "hf://owner/name"),
        ("file:///srv/a", "file:///srv/a"),
    ],
)
def test_paths_are_folders_of_the_registrys_machine_or_repositories(path: str, source: str) -> None:
    assert source_of(path) == source
