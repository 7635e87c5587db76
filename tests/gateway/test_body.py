"""Bodies: sizes, encodings, deadlines."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_gateway import body as body_module
from softprompt_gateway.body import leave_out_unknown, parse_object
from softprompt_gateway.errors import Refused
from softprompt_gateway.openai.chat import ChatRequest
from softprompt_gateway.openai.completions import parse_prompts
from softprompt_gateway.openai.parts import MAX_PARTS, check_number_of_parts
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.tokens import TokenizeChatRequest
from softprompt_gateway.validation import RequestModel

COMPLETIONS = "/v1/completions"


def test_an_object_is_parsed() -> None:
    assert parse_object('{"a": [1, 2.5, "é", null, true], "b": {"c": 1}}'.encode()) == {
        "a": [1, 2.5, "é", None, True],
        "b": {"c": 1},
    }


def test_a_key_that_stands_twice_is_named() -> None:
    with pytest.raises(Refused, match="'b' twice"):
        parse_object(b'{"a": 1, "b": 2, "b": 3}')


@pytest.mark.parametrize("gateway_settings", [{"max_body_bytes": 2000}])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_is_refused_whether_its_size_is_told_or_not(stack: Any, chunked: bool) -> None:
    content = json.dumps({"model": stack.base, "prompt": "x" * 100_000}).encode()

    async def pieces() -> Any:
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    response = await stack.http.post(
        COMPLETIONS, content=pieces() if chunked else content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


async def test_five_megabytes_are_refused_and_the_answer_arrives(stack: Any) -> None:
    assert (await stack.complete("x" * 5_000_000)).status_code == 413


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "br"},
    ],
)
async def test_another_kind_of_body_is_refused(stack: Any, headers: dict[str, str]) -> None:
    response = await stack.http.post(COMPLETIONS, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
async def test_json_may_be_called_json_in_several_ways(stack: Any, content_type: str) -> None:
    content = json.dumps({"model": stack.base, "prompt": "x"})
    response = await stack.http.post(COMPLETIONS, content=content, headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize("gateway_settings", [{"body_timeout_s": 0.2}])
async def test_a_body_that_does_not_come_is_not_waited_for(stack: Any) -> None:
    reader, writer = await stack.connect(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{"
    )
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in answer
    writer.close()


@pytest.mark.parametrize(("size", "is_apart"), [(1_000, False), (1_000_000, True)])
async def test_a_large_body_is_read_and_checked_where_nobody_waits_for_it(
    stack: Any, monkeypatch: pytest.MonkeyPatch, size: int, is_apart: bool
) -> None:
    threads: list[threading.Thread] = []

    def checked(model: Any, value: Any) -> Any:
        threads.append(threading.current_thread())
        return model.model_validate(value)

    monkeypatch.setattr(RequestModel, "checked", classmethod(checked))
    for path in ("/tokenize", COMPLETIONS):
        assert (await stack.post(path, model=stack.base, prompt="x" * size)).status_code == 200
    assert [thread is not threading.current_thread() for thread in threads] == [is_apart] * 2


async def test_of_bytes_that_are_no_text_the_place_is_told(stack: Any) -> None:
    answer = await stack.http.post(
        COMPLETIONS, content=b'{"a": "\xff"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body is not UTF-8: byte 7 is 0xff"


def test_of_very_many_objects_some_are_looked_through_for_what_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_MAX_LOOKED_THROUGH", 5)  # the request, its list, and three of that
    messages = [{"role": "user", "content": "x", "odd": number} for number in range(10)]
    body = {"messages": messages, "odd": 1}
    assert leave_out_unknown(body, ChatRequest) == ["odd", *(f"messages.{number}.odd" for number in range(3))]
    assert [message.get("odd") for message in messages] == [None] * 3 + list(range(3, 10))


def test_lists_in_lists_make_no_more_of_what_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_MAX_LOOKED_THROUGH", 20)
    handed_out = 0

    class Parts(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal handed_out
            for part in super().__iter__():
                handed_out += 1
                yield part

    messages = [{"role": "user", "content": Parts([{}] * 100)} for _ in range(5)]
    leave_out_unknown({"messages": messages}, ChatRequest)
    assert handed_out <= 20


@pytest.mark.parametrize("gateway_settings", [{"unknown_fields": "warn"}])
@pytest.mark.parametrize(
    ("path", "field"), [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), (COMPLETIONS, "prompt")]
)
async def test_very_many_objects_are_refused(stack: Any, path: str, field: str) -> None:
    content = f'{{"model": "{stack.base}", "{field}": [{",".join(["{}"] * 200_000)}]}}'
    answer = await stack.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(field)


def test_parts_are_counted_until_there_are_too_many() -> None:
    contents = iter(["text", [1] * MAX_PARTS, [1], "not looked at"])
    with pytest.raises(InvalidArgument, match=f"at most {MAX_PARTS} in one request"):
        check_number_of_parts(contents, field="messages")
    assert next(contents) == "not looked at"


@pytest.mark.parametrize(("model", "field"), [(ChatRequest, "messages"), (ResponsesRequest, "input")])
def test_of_too_many_turns_the_parts_are_not_counted(model: Any, field: str) -> None:
    class Turn(dict[str, Any]):
        looked_at = 0

        def get(self, name: str, default: Any = None) -> Any:
            self.looked_at += name == "content"
            return super().get(name, default)

    turns = [Turn(role="user", content="x") for _ in range(5000)]
    with pytest.raises(Refused, match="at most 4096 items"):
        model.checked({"model": "m", field: turns})
    assert not any(turn.looked_at for turn in turns[4097:])


@pytest.mark.parametrize("route", [ChatRequest, TokenizeChatRequest])
def test_of_very_many_wrong_calls_the_first_is_told(route: type[RequestModel]) -> None:
    class Call(dict[str, Any]):
        """Counts how many are looked at, by how often their number of members is asked for."""

        looked_at = 0

        def __len__(self) -> int:
            Call.looked_at += 1
            return super().__len__()

    turns = [{"role": "assistant", "tool_calls": [Call() for _ in range(100)]} for _ in range(100)]
    with pytest.raises(Refused, match=r"messages.0.tool_calls.0.id is required"):
        route.checked({"model": "m", "messages": turns})
    assert 0 < Call.looked_at <= 1000


def test_very_many_lists_are_no_prompts() -> None:
    with pytest.raises(InvalidArgument, match="5000 prompts; at most 4096"):
        parse_prompts([[1]] * 5000)
