"""The event stream of `/v1/responses`, event by event and through OpenAI's client."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio
from openai.types.responses import Response, ResponseStreamEvent
from softprompt_gateway.openai.responses.events import Events
from softprompt_gateway.openai.responses.output import Output
from softprompt_gateway.openai.tool_calls import CallPiece

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
OPENING = ["response.created", "response.in_progress"]
MESSAGE_OPENS = ["response.output_item.added", "response.content_part.added"]
MESSAGE_ENDS = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
CALL_ENDS = ["response.function_call_arguments.done", "response.output_item.done"]
DELTAS = ("response.output_text.delta", "response.function_call_arguments.delta")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(running_stack: Any) -> AsyncIterator[Any]:
    async with running_stack() as running:
        await running.registry.add("loud")
        await running.until_listed("loud")
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(stack: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with stack.sdk() as client:
        yield client


async def streamed(stack: Any, input_: Any, **body: Any) -> list[dict[str, Any]]:
    """The events, numbered and in the shape that OpenAI's own models take."""
    response = await stack.post(PATH, **{"model": stack.base, "input": input_, "stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    events = []
    for block in blocks:
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types in order, deltas that follow each other as one."""
    types = [event["type"] for event in events]
    return [
        kind for before, kind in zip([None, *types], types, strict=False) if kind != before or kind not in DELTAS
    ]


def nameless(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what is another's in each."""
    items = [{**item, "id": "", "call_id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": items}


async def test_a_text_comes_in_openais_order_of_events(stack: Any) -> None:
    events = await streamed(stack, "hello\n\u2028é")
    assert kinds(events) == [
        *OPENING,
        *MESSAGE_OPENS,
        "response.output_text.delta",
        *MESSAGE_ENDS,
        "response.completed",
    ]
    assert [events[number]["response"]["status"] for number in (0, 1)] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == []
    added, part = events[2:4]
    assert added["item"] == {
        "id": added["item"]["id"],
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert part["part"] == empty
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(delta["delta"] for delta in deltas) == "hello\n\u2028é"
    text_done, part_done, item_done, completed = events[-4:]
    assert text_done["text"] == "hello\n\u2028é"
    assert part_done["part"] == {**empty, "text": "hello\n\u2028é"}
    assert item_done["item"] == completed["response"]["output"][0]
    for event in (part, *deltas, text_done, part_done):
        assert (event["item_id"], event["output_index"]) == (added["item"]["id"], 0)
        assert event["content_index"] == 0
    Response.model_validate(completed["response"])
    assert completed["response"]["usage"]["output_tokens"] == len("hello\n\u2028é")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("hello", {}),
        ("hello", {"stop": ["h"]}),
        ("hello", {"max_output_tokens": 2}),
        ("hello", {"include": [LOGPROBS], "top_logprobs": 2}),
        ("hello", {"return_token_ids": True, "metadata": {"a": "b"}}),
        ("hello", {"tools": [WEATHER]}),
        (f"See: {CALL}\n{CALL} and more", {"tools": [WEATHER]}),
        (f"{CALL}", {"tools": [WEATHER], "max_output_tokens": 60}),
        (f"{CALL} a <tool_call>b", {"tools": [WEATHER]}),
    ],
)
async def test_a_stream_ends_with_what_the_whole_answer_is(stack: Any, text: str, fields: Any) -> None:
    whole = (await stack.post(PATH, model=stack.base, input=text, **fields)).json()
    events = await streamed(stack, text, **fields)
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert nameless(events[-1]["response"]) == nameless(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]


async def test_calls_come_in_openais_order_of_events(stack: Any) -> None:
    events = await streamed(stack, f"See:{CALL}{CALL}", tools=[WEATHER])
    call = ["response.output_item.added", "response.function_call_arguments.delta", *CALL_ENDS]
    assert kinds(events) == [
        *OPENING,
        *MESSAGE_OPENS,
        "response.output_text.delta",
        *MESSAGE_ENDS,
        *call,
        *call,
        "response.completed",
    ]
    for index in (1, 2):
        own = [event for event in events if event.get("output_index") == index]
        added, *deltas, whole, done = own
        assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
        assert "".join(event["delta"] for event in deltas) == whole["arguments"] == ARGUMENTS
        assert done["item"] == {**added["item"], "arguments": ARGUMENTS, "status": "completed"}
        assert {event["item_id"] for event in (*deltas, whole)} == {done["item"]["id"]}


async def test_what_is_said_is_told_before_the_output_has_ended(stack: Any) -> None:
    body = {"model": stack.base, "input": "stall", "stream": True}
    async with stack.http.stream("POST", PATH, json=body) as response:
        async for line in response.aiter_lines():
            if '"delta":"s"' in line:
                break
    await stack.inference.until(lambda fake: not fake.running)


async def test_each_piece_of_a_call_is_an_event_of_its_own(stack: Any) -> None:
    events = Events()
    output = Output(events)
    output.call(CallPiece(index=0, id="call_1", name="f", arguments='{"a"'))
    for piece in (": ", "1"):
        output.call(CallPiece(index=0, arguments=piece))
    output.call(CallPiece(index=0, arguments="}", is_last=True))
    told = [json.loads(block.partition("data: ")[2]) for block in events.take().decode().split("\n\n")[:-1]]
    assert [event.get("delta") for event in told] == [None, '{"a"', ": ", "1", "}", None, None]
    assert told[-1]["item"] == {
        "id": told[0]["item"]["id"],
        "type": "function_call",
        "status": "completed",
        "call_id": "call_1",
        "name": "f",
        "arguments": '{"a": 1}',
    }
    assert events.take() == b""


async def test_logprobs_come_with_their_text(stack: Any) -> None:
    events = await streamed(stack, "ab", include=[LOGPROBS], top_logprobs=1)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    entries = [entry for delta in deltas for entry in delta["logprobs"]]
    assert [entry["token"] for entry in entries] == ["a", "b"]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == entries
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == entries


@pytest.mark.parametrize(
    ("reason", "code", "failure"),
    [
        ("UNAVAILABLE", "unavailable", "server_error"),
        ("RATE_LIMITED", "rate_limit_exceeded", "rate_limit_exceeded"),
        ("INVALID_ARGUMENT", "invalid_value", "invalid_prompt"),
    ],
)
async def test_a_failure_after_the_first_byte_is_an_error_event(
    stack: Any, reason: str, code: str, failure: str
) -> None:
    events = await streamed(stack, f"break {reason}")
    error, failed = events[-2:]
    assert error == {
        "type": "error",
        "code": code,
        "message": "broken as asked",
        "param": None,
        "sequence_number": len(events) - 2,
    }
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": failure, "message": "broken as asked"}
    [message] = response["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "b")
    assert kinds(events) == [
        *OPENING,
        *MESSAGE_OPENS,
        "response.output_text.delta",
        "error",
        "response.failed",
    ]


async def test_a_failure_before_the_first_byte_has_its_own_status(stack: Any) -> None:
    response = await stack.post(PATH, model=stack.base, input="refuse OVERLOADED", stream=True)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")


async def test_a_stream_names_the_adapters_that_answer(stack: Any) -> None:
    response = await stack.post(PATH, model="loud", input="x", stream=True)
    assert response.headers["x-softprompt-adapter"] == "loud@1"
    assert response.headers["cache-control"] == "no-cache"
    assert '"delta":"X"' in response.text


async def test_openais_client_reads_the_events(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.responses.create(model=stack.base, input="hello", stream=True)
    events = [event async for event in stream]
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "hello"


class Thing(pydantic.BaseModel):
    a: int


async def test_openais_client_puts_a_stream_together(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model=stack.base, input='{"a": 5}', text_format=Thing) as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == '{"a": 5}'
    assert final.output_parsed == Thing(a=5)
    async with sdk.responses.stream(model=stack.base, input=f"See:{CALL}", tools=[WEATHER]) as stream:
        final_call = (await stream.get_final_response()).output[1]
    assert final_call.type == "function_call"
    assert final_call.parsed_arguments == {"city": "Paris"}


async def test_openais_client_reads_how_a_stream_broke(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.responses.create(model=stack.base, input="break UNAVAILABLE", stream=True)
    error, failed = [event async for event in stream][-2:]
    assert error.type == "error"
    assert error.code == "unavailable"
    assert failed.type == "response.failed"
    assert failed.response.error is not None
    assert failed.response.error.code == "server_error"
