"""`/v1/responses` answered as a whole, by OpenAI's client and by hand; the fake model repeats the last input."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
import pytest_asyncio
from openai.types.responses import Response
from softprompt_api.inference.v1 import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "get_weather", "description": "Of a city.", "parameters": PARAMETERS}
TIME: Any = {"type": "function", "name": "get_time"}
IN_CHAT = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Of a city.", "parameters": PARAMETERS},
}
ARGUMENTS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 2**70}}, "required": ["a"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(running_stack: Any) -> AsyncIterator[Any]:
    async with running_stack() as running:
        await running.registry.add("loud")
        await running.registry.add("soft", virtual_tokens=2)
        await running.until_listed("loud", "soft")
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sdk(stack: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with stack.sdk() as client:
        yield client


async def respond(stack: Any, input_: Any, **body: Any) -> dict[str, Any]:
    """The answer, which OpenAI's own model of it takes."""
    response = await stack.post(PATH, **{"model": stack.base, "input": input_} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    Response.model_validate(answer)
    return answer


def asked(stack: Any) -> pb.GenerateRequest:
    request: pb.GenerateRequest = stack.inference.requests[-1]
    return request


def turns(stack: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in asked(stack).chat.messages]


async def test_a_text_is_answered(stack: Any) -> None:
    answer = await respond(stack, "hello")
    [message] = answer["output"]
    assert answer["id"].startswith("resp_")
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}],
    }
    assert (answer["object"], answer["model"], answer["status"]) == ("response", stack.base, "completed")
    assert (answer["error"], answer["incomplete_details"]) == (None, None)
    assert answer["completed_at"] >= answer["created_at"]
    assert answer["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0, "virtual_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }
    assert turns(stack) == [("user", "hello")]
    assert asked(stack).chat.add_generation_prompt
    assert not asked(stack).sampling.HasField("max_tokens")


async def test_an_answer_repeats_its_request(stack: Any) -> None:
    format_ = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    given: dict[str, Any] = {
        "instructions": "Be short.",
        "max_output_tokens": 90,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "text": {"format": format_, "verbosity": "medium"},
        "tool_choice": "none",
        "tools": [{**WEATHER, "strict": True}],
        "top_p": 0.9,
        "truncation": "disabled",
        "user": "u",
    }
    answer = await respond(stack, "x", **given, include=[LOGPROBS], top_logprobs=2)
    assert {name: answer[name] for name in given} == given
    assert answer["top_logprobs"] == 2


async def test_an_answer_tells_defaults_and_what_there_is_not(stack: Any) -> None:
    answer = await respond(stack, "x", store=True, service_tier="flex", stream_options=None)
    assert {name: value for name, value in answer.items() if name not in ("id", "output", "usage")} == {
        "object": "response",
        "created_at": answer["created_at"],
        "status": "completed",
        "completed_at": answer["completed_at"],
        "error": None,
        "incomplete_details": None,
        "model": stack.base,
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 0.95,
        "truncation": "disabled",
        "user": None,
    }


async def test_of_what_a_request_does_not_say_an_answer_tells_what_the_model_recommends(stack: Any) -> None:
    for given, told in (({}, (1.0, 0.95)), ({"temperature": 0, "top_p": 1}, (0, 1))):
        answer = await respond(stack, "x", **given)
        assert (answer["temperature"], answer["top_p"]) == told
        assert asked(stack).sampling.HasField("top_p") == ("top_p" in given)


async def test_an_output_that_was_cut_is_incomplete(stack: Any) -> None:
    answer = await respond(stack, "hello", max_output_tokens=3)
    assert (answer["status"], answer["completed_at"]) == ("incomplete", None)
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    [message] = answer["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "hel")


async def test_an_empty_output_is_a_message_all_the_same(stack: Any) -> None:
    [message] = (await respond(stack, "hello", stop=["h"]))["output"]
    assert (message["status"], message["content"][0]["text"]) == ("completed", "")


async def test_items_are_turns(stack: Any) -> None:
    items = [
        {"role": "developer", "content": "one"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two"}]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "phase": None,
            "content": [
                {"type": "output_text", "text": "three", "annotations": [], "logprobs": []},
                {"type": "output_text", "text": "more"},
            ],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {
            "type": "function_call",
            "call_id": "call_2",
            "name": "g",
            "arguments": '{"a": 1}',
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "four"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "five"}]},
        {"type": "function_call", "call_id": "call_3", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_3", "output": "six"},
    ]
    await respond(stack, items, instructions="zero")
    call = pb.ToolCall
    assert list(asked(stack).chat.messages) == [
        pb.ChatMessage(role="system", content="zero"),
        pb.ChatMessage(role="developer", content="one"),
        pb.ChatMessage(role="user", content="two"),
        pb.ChatMessage(
            role="assistant",
            content="three\nmore",
            tool_calls=[
                call(id="call_1", name="f", arguments="{}"),
                call(id="call_2", name="g", arguments='{"a": 1}'),
            ],
        ),
        pb.ChatMessage(role="tool", tool_call_id="call_1", content="four"),
        pb.ChatMessage(role="tool", tool_call_id="call_2", content="five"),
        pb.ChatMessage(role="assistant", tool_calls=[call(id="call_3", name="f", arguments="{}")]),
        pb.ChatMessage(role="tool", tool_call_id="call_3", content="six"),
    ]


async def test_sampling_fields_of_ours_reach_the_service(stack: Any) -> None:
    extras = {"top_k": 5, "min_p": 0.1, "seed": 7, "ignore_eos": True, "min_tokens": 2, "stop": "!"}
    await respond(stack, "x", **extras, cache_salt="salt", logit_bias={"65": 1.5}, presence_penalty=0.5)
    sampling = asked(stack).sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.ignore_eos) == (5, 0.1, 7, True)
    assert (sampling.min_tokens, list(sampling.stop), dict(sampling.logit_bias)) == (2, ["!"], {65: 1.5})
    assert (sampling.presence_penalty, sampling.n) == (0.5, 1)
    assert asked(stack).cache_salt == "default/salt"


async def test_adapters_answer_and_are_named(stack: Any) -> None:
    response = await stack.post(PATH, model="soft+loud@1", input="x")
    assert response.json()["model"] == "soft+loud@1"
    assert response.json()["output"][0]["content"][0]["text"] == "X"
    assert response.json()["usage"]["input_tokens_details"]["virtual_tokens"] == 7
    assert response.headers["x-softprompt-adapter"] == "soft@1+loud@1"
    assert response.headers["x-softprompt-adapter-digest"] == asked(stack).adapter


async def test_soft_prompts_stand_inside_the_input(stack: Any) -> None:
    content = [{"type": "input_text", "text": "a"}, {"type": "soft_prompt", "name": "loud"}]
    answer = await respond(stack, [{"role": "user", "content": content}])
    [part, inside] = asked(stack).chat.messages[0].parts
    assert part.text == "a"
    assert inside.soft_prompt.startswith("sha256:")
    assert answer["usage"]["input_tokens_details"]["virtual_tokens"] == 5
    missing = await stack.post(
        PATH,
        model=stack.base,
        input=[{"role": "user", "content": [{"type": "soft_prompt", "name": "nobody"}]}],
    )
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "input")


async def test_token_ids_come_where_asked_for(stack: Any) -> None:
    answer = await respond(stack, "abc", return_token_ids=True, max_output_tokens=2)
    assert (answer["prompt_token_ids"], answer["token_ids"]) == ([97, 98, 99], [97, 98])
    assert "token_ids" not in await respond(stack, "abc")


async def test_logprobs_stand_at_the_text(stack: Any) -> None:
    answer = await respond(stack, "ab", include=[LOGPROBS], top_logprobs=1)
    [part] = answer["output"][0]["content"]
    top = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert part["logprobs"][0] == {**top, "top_logprobs": [top]}
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"]
    plain = await respond(stack, "ab", include=[LOGPROBS])
    assert [entry["top_logprobs"] for entry in plain["output"][0]["content"][0]["logprobs"]] == [[], []]


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, pb.Grammar(json_object=True)),
        (
            {
                "type": "json_schema",
                "name": "x",
                "schema": {"type": "object"},
                "description": "d",
                "strict": False,
            },
            pb.Grammar(json_schema='{"type": "object"}'),
        ),
    ],
)
async def test_a_format_reaches_the_service(stack: Any, format_: Any, expected: pb.Grammar | None) -> None:
    await respond(stack, "x", text={"format": format_})
    grammar = asked(stack).sampling.grammar if asked(stack).sampling.HasField("grammar") else None
    assert grammar == expected


async def test_structured_outputs_of_ours_work_here_too(stack: Any) -> None:
    await respond(stack, "x", structured_outputs={"regex": "x+"})
    assert asked(stack).sampling.grammar == pb.Grammar(regex="x+")


async def test_calls_are_items(stack: Any) -> None:
    answer = await respond(stack, f"Let me see.\n{CALL}\n{CALL} Done.", tools=[WEATHER, TIME])
    first, one, other, last = answer["output"]
    assert (first["type"], first["content"][0]["text"]) == ("message", "Let me see.")
    assert (last["type"], last["content"][0]["text"].strip()) == ("message", "Done.")
    for call in (one, other):
        assert call["id"].startswith("fc_")
        assert call["call_id"].startswith("call_")
        told = {name: call[name] for name in ("type", "name", "arguments", "status")}
        assert told == {
            "type": "function_call",
            "name": "get_weather",
            "arguments": ARGUMENTS,
            "status": "completed",
        }
    assert one["call_id"] != other["call_id"]
    assert answer["status"] == "completed"
    assert [json.loads(tool) for tool in asked(stack).chat.tools] == [
        IN_CHAT,
        {"type": "function", "function": {"name": "get_time"}},
    ]


async def test_calls_alone_are_the_only_items(stack: Any) -> None:
    answer = await respond(stack, CALL, tools=[WEATHER])
    assert [item["type"] for item in answer["output"]] == ["function_call"]


async def test_a_call_that_was_cut_is_incomplete_and_one_before_is_not(stack: Any) -> None:
    answer = await respond(stack, CALL + CALL, tools=[WEATHER], max_output_tokens=len(CALL) + 60)
    first, second = answer["output"]
    assert (first["status"], second["status"], answer["status"]) == ("completed", "incomplete", "incomplete")
    assert ARGUMENTS.startswith(second["arguments"])
    whole = await respond(stack, CALL, tools=[WEATHER], max_output_tokens=len(CALL) - 5)
    assert (whole["output"][0]["status"], whole["status"]) == ("completed", "incomplete")
    stopped = await respond(stack, CALL, tools=[WEATHER], stop=["}"])
    assert (stopped["output"][0]["status"], stopped["status"]) == ("incomplete", "completed")


@pytest.mark.parametrize(
    ("choice", "forced", "others"),
    [
        ("auto", [], []),
        ("required", ["get_weather", "get_time"], []),
        ({"type": "function", "name": "get_weather"}, ["get_weather"], ["get_time"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "get_time"}],
            },
            ["get_time"],
            ["get_weather"],
        ),
    ],
)
async def test_a_choice_of_tools_is_a_grammar(
    stack: Any, choice: Any, forced: list[str], others: list[str]
) -> None:
    answer = await respond(stack, "x", tools=[WEATHER, TIME], tool_choice=choice)
    assert answer["tool_choice"] == choice
    assert len(asked(stack).chat.tools) == 2
    lark = asked(stack).sampling.grammar.lark
    assert bool(lark) == bool(forced)
    assert all(name in lark for name in forced)
    assert not any(name in lark for name in others)


async def test_only_allowed_tools_are_read_as_calls(stack: Any) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    answer = await respond(stack, CALL, tools=[WEATHER, TIME], tool_choice=allowed)
    assert [item["type"] for item in answer["output"]] == ["message"]
    answer = await respond(stack, CALL, tools=[WEATHER], tool_choice="none")
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert not asked(stack).chat.tools


async def test_openais_client_sends_outputs_and_results_back(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    conversation: Any = [{"role": "user", "content": f"See:{CALL}"}]
    first = await sdk.responses.create(model=stack.base, input=conversation, tools=[WEATHER])
    assert first.output_text == "See:"
    call = first.output[1]
    assert call.type == "function_call"
    conversation += first.output
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = await sdk.responses.create(model=stack.base, input=conversation, tools=[WEATHER])
    assert second.output_text == "sunny"
    _, assistant, result = asked(stack).chat.messages
    assert (assistant.content, assistant.tool_calls[0].id) == ("See:", call.call_id)
    assert result.tool_call_id == call.call_id


@pytest.mark.parametrize("by_alias", [False, True])
async def test_a_call_and_its_tool_are_sent_back_as_openais_client_dumps_them(
    stack: Any, sdk: openai.AsyncOpenAI, by_alias: bool
) -> None:
    first = await sdk.responses.create(model=stack.base, input=f"See:{CALL}", tools=[WEATHER])
    items: Any = [item.model_dump(by_alias=by_alias) for item in first.output]
    tools: Any = [tool.model_dump(by_alias=by_alias) for tool in first.tools]
    second = await sdk.responses.create(
        model=stack.base, input=[*items, {"role": "user", "content": "and?"}], tools=tools
    )
    assert second.output_text == "and?"
    assert asked(stack).chat.messages[0].tool_calls[0].name == "get_weather"


@pytest.mark.parametrize("name", ["async", "async_"])
async def test_a_call_and_a_tool_that_are_asynchronous_are_refused(stack: Any, name: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "", name: True}
    for fields, param in (
        ({"input": [call]}, f"input.0.{name}"),
        ({"tools": [WEATHER | {name: True}]}, f"tools.{name}"),
    ):
        error = (await stack.post("/v1/responses", **{"model": stack.base, "input": "x"} | fields)).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)


class Thing(pydantic.BaseModel):
    a: int


async def test_what_openais_client_parsed_is_sent_back_as_it_dumps_it(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.parse(model=stack.base, input='{"a": 5}', text_format=Thing)
    called = await sdk.responses.parse(model=stack.base, input=CALL, tools=[{**WEATHER, "strict": True}])
    items: Any = [item.model_dump() for item in (*answer.output, *called.output)]
    items[0]["content"][0]["parsed"] = {"a": 5}
    items[1]["parsed_arguments"] = {"city": "Paris"}
    await respond(stack, [*items, {"role": "user", "content": "and?"}], tools=[WEATHER])
    assistant = asked(stack).chat.messages[0]
    assert (assistant.content, assistant.tool_calls[0].arguments) == ('{"a": 5}', ARGUMENTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": {"effort": None, "summary": None}},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {}},
        {"tools": [], "tool_choice": "auto"},
        {"prompt_cache_retention": "24h"},
        {"echo": False, "priority": 0, "use_beam_search": False},
    ],
)
async def test_what_asks_for_nothing_is_accepted(stack: Any, fields: Any) -> None:
    await respond(stack, "x", **fields)


async def test_a_call_without_arguments_may_say_nothing(stack: Any) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}
    await respond(stack, [call, {"role": "user", "content": "x"}])
    assert asked(stack).chat.messages[0].tool_calls[0].arguments == ""


class GetWeather(pydantic.BaseModel):
    city: str


async def test_openais_client_parses_answers_and_calls(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.parse(model=stack.base, input='{"a": 5}', text_format=Thing)
    assert answer.output_parsed == Thing(a=5)
    assert asked(stack).sampling.grammar.json_schema
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")["function"]
    tools: Any = [{"type": "function", **tool}]
    answer_with_call = await sdk.responses.parse(model=stack.base, input=CALL, tools=tools)
    [call] = answer_with_call.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Paris"}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_no_response_is_stored(stack: Any, method: str) -> None:
    answer = await respond(stack, "x", store=True)
    response = await stack.http.request(method, f"{PATH}/{answer['id']}")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "not_found", "response_id")
    assert answer["id"] in error["message"]
    assert "not stored" in error["message"]


async def test_openais_client_reads_that_nothing_is_stored(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.delete("resp_1")


def said(**part: Any) -> list[Any]:
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", ""),
        ({"prompt": {"id": "p"}}, "prompt", ""),
        ({"reasoning": {"effort": "low"}}, "reasoning", ""),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, "reasoning", ""),
        ({"max_tool_calls": 5}, "max_tool_calls", ""),
        ({"context_management": [{"type": "compaction"}]}, "context_management", ""),
        ({"moderation": {"model": "m"}}, "moderation", ""),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"n": 2}, "n", "other than 1"),
        ({"n": True}, "n", "other than 1"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "reasoning.encrypted_content"),
        ({"include": [LOGPROBS], "tools": [WEATHER]}, "include", "functions"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "'medium'"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "", "namespace": "x"}]},
            "input.0.namespace",
            "",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools", "'mcp'"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.defer_loading", ""),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search'"),
        ({"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}, "text.format", "tools"),
        ({"tools": [WEATHER], "structured_outputs": {"regex": "a"}}, "structured_outputs", "tools"),
        ({"input": said(type="input_image", image_url="http://x/y.png")}, "input.0.content", "'input_image'"),
        ({"input": said(type="input_file", file_id="file-1")}, "input.0.content", "'input_file'"),
        ({"input": said(type="input_audio")}, "input.0.content", "'input_audio'"),
        ({"input": said(type="refusal", refusal="no")}, "input.0.content", "'refusal'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type", "'item_reference'"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input.0.type", "'reasoning'"),
        (
            {"input": said(type="output_text", text="x", annotations=[{"type": "url_citation"}])},
            "input.0.content.annotations",
            "",
        ),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(stack: Any, fields: Any, param: str, words: str) -> None:
    requests_before = len(stack.inference.requests)
    response = await stack.post(PATH, **{"model": stack.base, "input": "x"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", param)
    assert words in error["message"]
    assert len(stack.inference.requests) == requests_before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": {"role": "user", "content": "x"}}, "input"),
        ({"input": ["x"]}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": 5}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "nonsense": 1}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": {}}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": [LOGPROBS]}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format"),
        ({"text": {"format": {"type": "yaml"}}}, "text"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_time"}}, "tool_choice"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "get_time"}],
                },
            },
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(stack: Any, fields: Any, param: str) -> None:
    requests_before = len(stack.inference.requests)
    response = await stack.post(PATH, **{"model": stack.base, "input": "x"} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert len(stack.inference.requests) == requests_before


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("messages", "input"),
        ("max_tokens", "max_output_tokens"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text"),
        ("instruction", "instructions"),
    ],
)
async def test_an_unknown_field_is_named_with_what_it_is_here(stack: Any, field: str, instead: str) -> None:
    error = (await stack.post(PATH, model=stack.base, input="x", **{field: 1})).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", field)
    assert f"did you mean '{instead}'?" in error["message"]


@pytest.mark.parametrize(
    ("words", "status", "code", "param"),
    [
        ("refuse OVERLOADED", 503, "overloaded", "input"),
        ("refuse CONTEXT_LENGTH_EXCEEDED", 400, "context_length_exceeded", "input"),
        ("refuse-grammar", 400, "invalid_value", "text.format"),
        ("crash", 500, "internal_error", None),
        ("break UNAVAILABLE", 503, "unavailable", None),
    ],
)
async def test_failures_of_the_service_are_told_in_this_routes_words(
    stack: Any, words: str, status: int, code: str, param: str | None
) -> None:
    response = await stack.post(
        PATH, model=stack.base, input=words, text={"format": {"type": "json_object"}}, stream=False
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
