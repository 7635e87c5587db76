"""Tools of chat requests, through OpenAI's client and by hand; the fake model repeats what the user says."""

import json
from typing import Any

import openai
import pytest
from softprompt_gateway.openai.tools import Tool, grammar_of

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "$defs": {"city": {"type": "string"}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
STRICT: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def asked(stack: Any) -> Any:
    return stack.inference.requests[-1]


async def test_a_call_is_told_apart_from_the_text(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": f"Let me see.\n{CALL}"}]
    answer = await sdk.chat.completions.create(model=stack.base, messages=messages, tools=[WEATHER])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    assert call.id.startswith("call_")


async def test_calls_alone_have_no_content(stack: Any) -> None:
    [choice] = (await stack.chat(f"{CALL}\n{CALL}", tools=[WEATHER])).json()["choices"]
    assert choice["message"]["content"] is None
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2


async def test_an_answer_without_a_call_is_as_ever(stack: Any) -> None:
    [choice] = (await stack.chat("hello", tools=[WEATHER])).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_an_output_that_was_cut_keeps_its_reason(stack: Any) -> None:
    [choice] = (await stack.chat(CALL, tools=[WEATHER], max_tokens=70)).json()["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])


@pytest.mark.parametrize("stop", ["city", "}"])
async def test_a_call_that_a_stop_string_cut_is_not_told_as_whole(stack: Any, stop: str) -> None:
    [choice] = (await stack.chat(CALL, tools=[WEATHER], stop=stop)).json()["choices"]
    assert choice["finish_reason"] == "stop"
    events = await stack.events(
        "/v1/chat/completions",
        model=stack.base,
        messages=[{"role": "user", "content": CALL}],
        tools=[WEATHER],
        stop=stop,
    )
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_the_service_is_told_of_the_functions(stack: Any) -> None:
    await stack.chat("x", tools=[STRICT, TIME])
    assert [json.loads(tool) for tool in asked(stack).chat.tools] == [WEATHER, TIME]
    await stack.chat("x", tools=[WEATHER], tool_choice="none")
    assert not asked(stack).chat.tools
    assert not asked(stack).sampling.HasField("grammar")


async def test_numbers_of_any_size_in_a_schema_pass(stack: Any) -> None:
    tool = function(parameters={"type": "object", "properties": {"a": {"maximum": 2**70, "default": None}}})
    assert (await stack.chat("x", tools=[tool], tool_choice="required")).status_code == 200
    assert json.loads(asked(stack).chat.tools[0]) == tool
    assert str(2**70) in asked(stack).sampling.grammar.lark


async def test_calls_and_results_can_be_sent_back(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": CALL}]
    first = await sdk.chat.completions.create(model=stack.base, messages=messages, tools=[WEATHER])
    message = first.choices[0].message
    assert message.tool_calls is not None
    id_ = message.tool_calls[0].id
    messages += [message.model_dump(), {"role": "tool", "content": "sunny", "tool_call_id": id_}]
    second = await sdk.chat.completions.create(model=stack.base, messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "sunny"
    _, assistant, result = asked(stack).chat.messages
    [call] = assistant.tool_calls
    assert (call.id, call.name, call.arguments, assistant.content) == (id_, "get_weather", ARGUMENTS, "")
    assert result.tool_call_id == id_


def lark(choice: Any = None, *tools: Any, parallel: bool = True) -> str | None:
    return grammar_of([Tool.checked(tool) for tool in tools], choice, parallel=parallel)


def test_a_grammar_is_made_where_calls_must_be_right() -> None:
    assert lark("auto", WEATHER, TIME) is None
    assert lark(None, WEATHER) is None
    for text in (lark("required", WEATHER), lark("auto", STRICT), lark("auto", WEATHER, parallel=False)):
        assert text is not None
        assert text.startswith("start: ")


async def test_what_must_be_called_is_a_grammar(stack: Any) -> None:
    await stack.chat("x", tools=[WEATHER, TIME], tool_choice="required")
    required = asked(stack).sampling.grammar.lark
    assert "get_weather" in required
    assert "get_time" in required
    await stack.chat("x", tools=[WEATHER, TIME], tool_choice=NAMED)
    named = asked(stack).sampling.grammar.lark
    assert "get_weather" in named
    assert "get_time" not in named
    assert len(asked(stack).chat.tools) == 2


async def test_a_stream_tells_id_and_name_first_and_then_the_arguments(stack: Any) -> None:
    events = await stack.events(
        "/v1/chat/completions",
        model=stack.base,
        messages=[{"role": "user", "content": f"See:\n{CALL}\n{CALL}"}],
        tools=[WEATHER],
    )
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "See:"
    pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", ())]
    for index in range(2):
        first, *others = [piece for piece in pieces if piece["index"] == index]
        assert (first["type"], first["function"]["name"]) == ("function", "get_weather")
        assert first["id"].startswith("call_")
        assert len(others) > 3
        assert all(set(piece) == {"index", "function"} for piece in others)
        assert all(set(piece["function"]) == {"arguments"} for piece in others)
        arguments = "".join(piece["function"]["arguments"] for piece in (first, *others))
        assert arguments == ARGUMENTS
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}


@pytest.mark.parametrize("extras", [{}, {"logprobs": True}, {"return_token_ids": True}])
async def test_a_streams_text_is_whole_where_it_only_looked_like_a_call(stack: Any, extras: Any) -> None:
    for text in ("a <tool_call>b", "a <tool", "a \n", "<tool_call>x</tool_call>"):
        events = await stack.events(
            "/v1/chat/completions",
            model=stack.base,
            messages=[{"role": "user", "content": text}],
            tools=[WEATHER],
            n=2,
            **extras,
        )
        choices = [choice for event in events[:-1] for choice in event["choices"]]
        for index in range(2):
            own = [choice for choice in choices if choice["index"] == index]
            assert "".join(choice["delta"].get("content") or "" for choice in own) == text
            assert own[-1]["finish_reason"] == "stop"
        whole = await stack.chat(text, tools=[WEATHER])
        assert whole.json()["choices"][0]["message"]["content"] == text


async def test_openais_client_reads_the_stream(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": CALL}]
    async with sdk.chat.completions.stream(model=stack.base, messages=messages, tools=[STRICT]) as stream:
        final = await stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    assert final.choices[0].finish_reason == "tool_calls"


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "robot"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [function(name="a b")]}, "tools"),
        ({"tools": [function(name="")]}, "tools"),
        ({"tools": [function(name='f", "arguments": {}}')]}, "tools"),
        ({"tools": [function(name="f" * 65)]}, "tools"),
        ({"tools": [function(parameters=[])]}, "tools"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools"),
        ({"tools": [function(parameters=nested(100))]}, "tools"),
        ({"tools": [function(parameters={"enum": [1] * 100_000})]}, "tools"),
        ({"tools": [function(parameters={"x-guidance": {"lenient": True}})]}, "tools"),
        ({"tools": [function(description="x" * 200_000)]}, "tools"),
        ({"tools": [function(strict=1)]}, "tools"),
        ({"tools": [function(nonsense=1)]}, "tools"),
        ({"tools": [function(), function()]}, "tools"),
        ({"tools": [function(name=f"f{number}") for number in range(129)]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
async def test_bad_tools_are_refused_by_name(stack: Any, fields: Any, param: str) -> None:
    answer = await stack.chat("x", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == param
    assert not stack.inference.requests


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {
            "role": "user",
            "content": "x",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "1"},
    ],
)
async def test_bad_messages_of_tools_are_refused(stack: Any, message: Any) -> None:
    answer = await stack.post("/v1/chat/completions", model=stack.base, messages=[message])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("messages")


async def test_what_the_service_refuses_of_them_is_named(stack: Any) -> None:
    error = (await stack.chat("refuse-grammar", tools=[WEATHER], tool_choice="required")).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "tools")


@pytest.mark.parametrize("given", ["", " \n", "{}", "{", "Paris", "5"])
async def test_a_past_calls_arguments_are_handed_on_as_they_are(stack: Any, given: str) -> None:
    """What becomes of them is the inference service's to say, for its other clients too."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "x"}]
    answer = await stack.post("/v1/chat/completions", model=stack.base, messages=messages)
    assert answer.status_code == 200, answer.text
    assert asked(stack).chat.messages[0].tool_calls[0].arguments == given


async def test_arguments_that_are_no_text_are_told_with_their_message(stack: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    answer = await stack.post("/v1/chat/completions", model=stack.base, messages=messages)
    assert answer.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"
