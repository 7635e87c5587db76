"""Bodies: sizes, encodings, deadlines."""

import asyncio
import json
import threading
from typing import Any

import pytest
from softprompt_gateway import body as body_module
from softprompt_gateway.body import parse_object
from softprompt_gateway.errors import Refused

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
async def test_a_large_body_is_parsed_where_nobody_waits_for_it(
    stack: Any, monkeypatch: pytest.MonkeyPatch, size: int, is_apart: bool
) -> None:
    threads: list[threading.Thread] = []

    def parse(content: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread())
        return parse_object(content)

    monkeypatch.setattr(body_module, "parse_object", parse)
    assert (await stack.post("/tokenize", prompt="x" * size)).status_code == 200
    assert [thread is not threading.current_thread() for thread in threads] == [is_apart]


async def test_of_bytes_that_are_no_text_the_place_is_told(stack: Any) -> None:
    answer = await stack.http.post(
        COMPLETIONS, content=b'{"a": "\xff"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body is not UTF-8: byte 7 is 0xff"
