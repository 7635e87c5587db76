"""Bad requests, as data: each is refused in OpenAI's error shape, none is a 5xx, and the gateway goes on."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

# All tests here share one stack: it must survive them all.
pytestmark = pytest.mark.asyncio(loop_scope="module")
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
BASE = "acme/tiny-1"
HUGE = 2**70

# Beside the real system, e2e/test_hostile.py sends these too, and many more.
RAW_BODIES = yaml.safe_load((Path(__file__).parent.parent / "e2e" / "hostile" / "text.yaml").read_text("utf-8"))

# Fields that both routes know, each with values that are refused with its name.
SHARED_FIELDS: dict[str, list[Any]] = {
    "n": [0, -1, 10**9, HUGE, True, "1", 1.5, [1]],
    "max_tokens": [0, -1, HUGE, True, "16", 1.5, {}],
    "min_tokens": [-1, HUGE, True, "1", 101],
    "temperature": [-0.1, 2.1, 10**400, True, "1", [1]],
    "top_p": [0, -0.5, 1.5, True, "0.5"],
    "top_k": [-2, HUGE, True, 1.5, "5"],
    "min_p": [-0.1, 1.1, "0"],
    "seed": [HUGE, -HUGE, True, 1.5, "7"],
    "presence_penalty": [-2.1, 2.1, True, "1"],
    "frequency_penalty": [-2.1, 2.1, True, "1"],
    "repetition_penalty": [0, -1, 2.1, "1"],
    "stop": [["x"] * 17, [""], "", [1], 5, {}, ["x" * 2000], True],
    "stop_token_ids": [[-1], [HUGE], [True], ["1"], 5, [0] * 1000],
    "logit_bias": [
        {"x": 1},
        {"-1": 1},
        {"1.5": 1},
        {"": 1},
        {"1": 101},
        {"1": "1"},
        {"1": True},
        [],
        {"٣": 1},
        {"01": 1},
    ],
    "ignore_eos": [1, "true", 0.0],
    "stream": [1, "true", []],
    "stream_options": [{}, {"include_usage": True}, True, {"nonsense": 1}],
    "return_token_ids": [1],
    "structured_outputs": [{}, "x", {"regex": 5}, {"yaml": "x"}, {"json": {}, "regex": "x"}, {"choice": [""]}],
    "guided_json": [5, "", True],
    "guided_regex": [5, ""],
    "guided_choice": [[], "x", [1]],
    "guided_grammar": [5, " "],
    "guided_whitespace_pattern": [" ?"],
    "skip_special_tokens": ["no"],
    "typical_p": [0.5, 0, True, "1"],
    "truncate_prompt_tokens": [5, -1],
    "model": [None, 5, "", "x" * 600, ["acme/tiny-1"]],
}
COMPLETION_FIELDS: dict[str, list[Any]] = {
    "prompt": [
        *(None, "", [], [""], ["x", ""], [[]], [[1], []], 5, True, {}, {"a": "b"}),
        *([True], ["x", 1], [1, "x"], [[1], "x"], [-1], [HUGE], [1.5], [["x"]], [None], [256], [[1], [256]]),
    ],
    "logprobs": [-1, 21, HUGE, True, "5"],
    "prompt_logprobs": [-1, 21, HUGE, True, "5"],
    "best_of": [0, True, "1", HUGE, 129],
    "suffix": ["x"],
    "add_special_tokens": ["yes"],
    "echo": ["yes"],
}
CHAT_FIELDS: dict[str, list[Any]] = {
    "messages": [
        *([], None, "x", {}, [None], ["x"]),
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": ["text"]}]}],
    ],
    "max_completion_tokens": [0, HUGE, True, "5", 99],
    "logprobs": [1, 5, "true"],
    "top_logprobs": [-1, 5, 21, True],
    "response_format": [{"type": "json_schema"}, {"type": "x"}, {}, "text", 5],
    "tools": [[{"type": "function"}], "x"],
    "tool_choice": ["auto", {"type": "function"}],
    "functions": [[{}]],
    "function_call": ["auto"],
    "modalities": [["audio"]],
    "audio": [{"voice": "x"}],
    "reasoning_effort": ["high"],
    "add_special_tokens": [True],
    "continue_final_message": ["x"],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(running_stack: Any) -> AsyncIterator[Any]:
    async with running_stack() as running:
        await running.registry.add("loud")
        await running.until_listed("loud")
        yield running


def _id(value: Any) -> str:
    return repr(value)[:40].encode("ascii", "replace").decode()


def _table(fields: dict[str, list[Any]]) -> list[Any]:
    rows = [(name, value) for name, values in fields.items() for value in values]
    return [pytest.param(name, value, id=f"{name}={_id(value)}") for name, value in rows]


async def _refused(stack: Any, path: str, body: dict[str, Any], param: str) -> None:
    requests_before = len(stack.inference.requests)
    # json.dumps, because httpx would refuse to send what a hostile client sends.
    response = await stack.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if error["code"] != "invalid_json":
        assert error["param"].split(".")[0] == param
        assert error["message"]
    assert len(stack.inference.requests) == requests_before
    assert (await stack.http.get("/health/live")).status_code == 200


@pytest.mark.parametrize("row", [pytest.param(row, id=row["name"]) for row in RAW_BODIES])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
async def test_a_broken_body_is_refused(
    stack: Any, hostile_bytes: Callable[[Any], bytes], path: str, row: dict[str, Any]
) -> None:
    headers = {"content-type": "application/json"}
    response = await stack.http.post(path, content=hostile_bytes(row["raw"]), headers=headers)
    assert response.status_code == row["status"] == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if path == row["post"]:
        assert error["code"] == row["code"]


@pytest.mark.parametrize(("name", "value"), _table(SHARED_FIELDS | COMPLETION_FIELDS))
async def test_a_bad_field_of_a_completion_is_refused_by_name(stack: Any, name: str, value: Any) -> None:
    await _refused(stack, COMPLETIONS, {"model": BASE, "prompt": "x", "max_tokens": 100} | {name: value}, name)


@pytest.mark.parametrize(("name", "value"), _table(SHARED_FIELDS | CHAT_FIELDS))
async def test_a_bad_field_of_a_chat_is_refused_by_name(stack: Any, name: str, value: Any) -> None:
    body: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 100}
    param = "max_tokens" if (name, value) == ("max_completion_tokens", 99) else name
    await _refused(stack, CHAT, body | {name: value}, param)


@pytest.mark.parametrize(("name", "value"), _table(SHARED_FIELDS))
async def test_a_bad_field_of_a_response_is_refused_by_name(stack: Any, name: str, value: Any) -> None:
    await _refused(stack, RESPONSES, {"model": BASE, "input": "x", "max_output_tokens": 100} | {name: value}, name)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "x"},
        {"role": "robot", "content": "x"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": "x", "nonsense": 1},
        {"role": "user", "content": "x", "name": 5},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
    ],
)
async def test_a_bad_message_is_refused(stack: Any, message: Any) -> None:
    await _refused(stack, CHAT, {"model": BASE, "messages": [message]}, "messages")


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("temprature", "; did you mean 'temperature'?"),
        ("max_new_tokens", "; did you mean 'max_tokens'?"),
        ("stop_sequences", "; did you mean 'stop'?"),
        ("zzz", ""),
        ("x" * 10_000, ""),
        ("a\r\nb\x00", ""),
    ],
)
async def test_an_unknown_field_is_named_with_a_guess(stack: Any, field: str, hint: str) -> None:
    response = await stack.complete("x", **{field: 1})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unknown_parameter")
    assert error["message"].startswith("unknown parameter '")
    assert hint in error["message"]
    assert len(error["message"]) < 200
    assert "\n" not in error["message"]


@pytest.mark.parametrize("field", ["model", "prompt"])
async def test_a_missing_field_is_named(stack: Any, field: str) -> None:
    body = {"model": BASE, "prompt": "x"}
    del body[field]
    error = (await stack.post(COMPLETIONS, **body)).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", field)


@pytest.mark.parametrize(
    "model",
    [
        *("../etc/passwd", "%2e%2e", "a\x00b", "a\r\nb", "-x", "x" * 512, "🦜", "ACME/TINY-1", "Acme/tiny-1"),
        *(
            "loud@0",
            "loud@-1",
            "loud@x",
            "loud@99999999999",
            "loud@",
            "@1",
            "loud@1@2",
            "loud:task",
            "loud+nobody",
        ),
        *(
            "sha256:",
            "sha256:abc",
            "sha256:" + "0" * 64,
            "acme/tiny-1:",
            "acme/tiny-1:acme/tiny-1",
            "base",
            "gpt-4o",
        ),
    ],
)
async def test_an_unknown_model_is_not_found(stack: Any, model: str) -> None:
    response = await stack.complete("x", model=model)
    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize(("model", "near"), [("lowd", "loud"), ("acme/tiny-2", "acme/tiny-1"), ("Loud", "loud")])
async def test_an_unknown_model_comes_with_a_near_one(stack: Any, model: str, near: str) -> None:
    assert f"did you mean '{near}'?" in (await stack.complete("x", model=model)).json()["error"]["message"]


async def test_more_choices_than_allowed_are_refused_with_numbers(stack: Any) -> None:
    response = await stack.complete(["x"] * 65, n=2)
    assert response.status_code == 400
    assert "130 choices; at most 128" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_fields_that_do_not_go_together_are_refused(stack: Any, fields: dict[str, Any], param: str) -> None:
    error = (await stack.complete("x", **fields)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)


async def test_more_choices_to_choose_from_than_allowed_are_refused_with_numbers(stack: Any) -> None:
    error = (await stack.complete(["x"] * 65, best_of=2)).json()["error"]
    assert error["param"] == "best_of"
    assert "65 prompts with best_of=2 make 130 choices; at most 128" in error["message"]


@pytest.mark.parametrize(("field", "value"), [("suffix", "x")])
async def test_what_is_not_supported_has_its_own_code(stack: Any, field: str, value: Any) -> None:
    error = (await stack.complete("x", **{field: value})).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", field)


async def test_a_failing_service_tells_nothing_about_itself(stack: Any) -> None:
    response = await stack.complete("crash")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "passwd" not in response.text
    assert "Error" not in response.text


async def test_a_stream_beside_bad_requests_is_not_disturbed(
    stack: Any, hostile_bytes: Callable[[Any], bytes]
) -> None:
    alone = await stack.events(COMPLETIONS, model=BASE, prompt="canary", max_tokens=50)
    bad = [stack.http.post(COMPLETIONS, content=hostile_bytes(row["raw"])) for row in RAW_BODIES]
    beside, *refused = await asyncio.gather(
        stack.events(COMPLETIONS, model=BASE, prompt="canary", max_tokens=50), *bad
    )
    assert {response.status_code for response in refused} == {400}
    assert [event["choices"] for event in beside[:-1]] == [event["choices"] for event in alone[:-1]]
