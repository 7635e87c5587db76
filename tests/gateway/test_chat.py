"""POST /v1/chat/completions through OpenAI's client and by hand."""

import inspect
import json
from typing import Any

import openai
import pytest
from openai.resources.responses import Responses
from softprompt_gateway.openai.chat import ChatRequest
from softprompt_gateway.openai.completions import CompletionRequest
from softprompt_gateway.openai.responses.request import ResponsesRequest


async def test_a_conversation_is_continued(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=stack.base,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}],
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    messages = stack.inference.requests[-1].chat.messages
    assert [(message.role, message.content) for message in messages] == [
        ("developer", "be brief"),
        ("user", "hello"),
    ]


async def test_an_answers_own_message_may_be_sent_back(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    first = await sdk.chat.completions.create(model=stack.base, messages=[{"role": "user", "content": "hello"}])
    history: Any = [first.choices[0].message.model_dump(), {"role": "user", "content": "again"}]
    second = await sdk.chat.completions.create(model=stack.base, messages=history)
    assert second.choices[0].message.content == "again"


async def test_without_a_limit_as_many_tokens_as_fit_are_asked_for(stack: Any) -> None:
    await stack.chat("hello")
    assert not stack.inference.requests[-1].sampling.HasField("max_tokens")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit_work(stack: Any, name: str) -> None:
    choice = (await stack.chat("hello", **{name: 2})).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("he", "length")


@pytest.mark.parametrize(
    ("content", "field", "param"),
    [
        ("refuse CONTEXT_LENGTH_EXCEEDED", "max_tokens", "messages"),
        ("refuse-limit", "max_tokens", "max_tokens"),
        ("refuse-limit", "max_completion_tokens", "max_completion_tokens"),
    ],
)
async def test_what_the_service_refuses_is_named_as_it_was_sent(
    stack: Any, content: str, field: str, param: str
) -> None:
    assert (await stack.chat(content, **{field: 5})).json()["error"]["param"] == param


async def test_a_part_that_is_wrong_is_told_by_its_number(stack: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": 5}]
    error = (await stack.chat(parts)).json()["error"]
    assert (error["param"], error["message"]) == (
        "messages.0.content",
        "messages.0: content part 1: text: should be a valid string",
    )


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user"}, "content", "missing_required_parameter"),
        ({"role": "assistant", "content": None}, "content", "missing_required_parameter"),
        ({"role": "user", "content": 5}, "content", "invalid_value"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "odd": 1}]}, "content", "unknown_parameter"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content", "unsupported_parameter"),
        ({"role": "user", "content": ["x"]}, "content", "invalid_value"),
        ({**USER, "reasoning_content": "x"}, "reasoning_content", "unknown_parameter"),
        ({**USER, "audio": {"id": "x"}}, "audio", "unsupported_parameter"),
        ({**USER, "parsed": {"a": 1}}, "parsed", "unsupported_parameter"),
    ],
)
async def test_an_error_inside_messages_names_the_message(stack: Any, message: Any, param: str, code: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = await stack.post(path, model=stack.base, messages=[USER, USER, USER, message, message])
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, f"messages.3.{param}", code)
        assert "messages.3" in error["message"] or param in error["message"]


async def test_a_message_whose_kind_is_wrong_does_not_hide_which_other_is_refused(stack: Any) -> None:
    messages = [{"role": "robot", "content": "x"}, USER, {"role": "user"}]
    error = (await stack.post("/v1/chat/completions", model=stack.base, messages=messages)).json()["error"]
    assert error["param"] == "messages.2.content"


async def test_text_parts_are_joined_by_line_breaks(stack: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert (await stack.chat(parts)).json()["choices"][0]["message"]["content"] == "one\ntwo"


async def test_an_adapter_answers_in_chat_too(stack: Any) -> None:
    await stack.registry.add("loud")
    response = await stack.chat("hello", model="loud", n=2)
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == ["HELLO", "HELLO"]
    assert response.headers["x-softprompt-adapter"] == "loud@1"


async def test_logprobs_have_chats_shape(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=stack.base, messages=[{"role": "user", "content": "ab"}], logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [token.token for token in content] == ["a", "b"]
    assert content[0].bytes == [97]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.5), ("b", -1.5)]


async def test_logprobs_without_alternatives_are_asked_for_as_none(stack: Any) -> None:
    answer = await stack.chat("a", logprobs=True)
    assert answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert stack.inference.requests[-1].sampling.logprobs == 0


async def test_token_ids_are_returned_where_asked_for(stack: Any) -> None:
    answer = (await stack.chat("ab", return_token_ids=True)).json()
    assert answer["prompt_token_ids"] == [97, 98]
    assert answer["choices"][0]["token_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("fields", "opens", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
    ],
)
async def test_the_template_is_told_how_to_end(stack: Any, fields: Any, opens: bool, continues: bool) -> None:
    await stack.chat("x", **fields)
    chat = stack.inference.requests[-1].chat
    assert (chat.add_generation_prompt, chat.continue_final_message) == (opens, continues)


async def test_the_template_is_given_values(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    values = {"enable_thinking": False, "effort": ["high"]}
    await sdk.chat.completions.create(
        model=stack.base, messages=[{"role": "user", "content": "x"}], extra_body={"chat_template_kwargs": values}
    )
    assert json.loads(stack.inference.requests[-1].chat.chat_template_kwargs) == values
    await stack.chat("x", chat_template_kwargs=None)
    assert stack.inference.requests[-1].chat.chat_template_kwargs == ""


@pytest.mark.parametrize("values", ["x", [1], {"x": [[]] * 100_000}])
async def test_values_that_are_no_object_or_too_much_are_refused(stack: Any, values: Any) -> None:
    answer = await stack.chat("x", chat_template_kwargs=values)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"tools": []},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"add_special_tokens": False},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [], "tool_choice": "none"},
        {"logprobs": False, "top_logprobs": 0},
        {"stream": False, "stream_options": None},
        {"reasoning_effort": "none"},
        {"reasoning_effort": None, "verbosity": None, "moderation": None, "prompt_cache_options": None},
        {"verbosity": "medium", "prompt_cache_options": {}, "prompt_cache_retention": "24h"},
        {"echo": False, "suffix": "", "best_of": None, "bad_words": [], "use_beam_search": False},
        {"priority": 0, "length_penalty": 1.0, "chat_template": None},
    ],
)
async def test_what_changes_nothing_is_accepted(stack: Any, fields: Any) -> None:
    assert (await stack.chat("x", **fields)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"reasoning_effort": "low"}, "unsupported_parameter"),
        ({"verbosity": "low"}, "unsupported_parameter"),
        ({"moderation": {"model": "m"}}, "unsupported_parameter"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "unsupported_parameter"),
        ({"top_logprobs": 1}, "invalid_value"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "invalid_value"),
        ({"tool_choice": "auto"}, "invalid_value"),
        ({"tool_choice": "required", "tools": []}, "invalid_value"),
        ({"echo": True}, "unknown_parameter"),
        ({"priority": 1}, "unknown_parameter"),
        ({"priority": False, "length_penalty": True}, "unknown_parameter"),
        ({"odd": None}, "unknown_parameter"),
        ({"odd": None, **{f"odd{number}": None for number in range(200)}, "echo": False}, "unknown_parameter"),
    ],
)
async def test_what_asks_for_something_is_refused(stack: Any, fields: Any, code: str) -> None:
    answer = await stack.chat("x", **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert error["param"] in fields


def test_no_field_of_openais_client_is_unknown() -> None:
    ours = {"extra_body", "extra_headers", "extra_query", "self", "timeout"}
    for create, model in (
        (openai.resources.chat.Completions.create, ChatRequest),
        (openai.resources.Completions.create, CompletionRequest),
        (Responses.create, ResponsesRequest),
    ):
        assert inspect.signature(create).parameters.keys() - ours <= model.model_fields.keys()


async def test_a_stream_opens_with_the_role_and_ends_with_its_reason(stack: Any) -> None:
    events = await stack.events(
        "/v1/chat/completions", model=stack.base, messages=[{"role": "user", "content": "abc"}]
    )
    assert events[-1] == "[DONE]"
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events[:-1]}) == 1
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert {key for choice in choices[1:-1] for key in choice["delta"]} == {"content"}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == "abc"
    assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["delta"] == {}
    assert all("usage" not in event for event in events[:-1])


async def test_usage_comes_last_where_asked_for(stack: Any) -> None:
    await stack.registry.add("loud", virtual_tokens=4)
    events = await stack.events(
        "/v1/chat/completions",
        model="loud",
        messages=[{"role": "user", "content": "abc"}],
        stream_options={"include_usage": True},
    )
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["prompt_tokens"] == 3
    assert events[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3, "virtual_tokens": 4}
    assert all(event["usage"] is None for event in events[:-2])


async def test_the_usage_so_far_comes_with_every_chunk_where_asked_for(stack: Any) -> None:
    await stack.registry.add("loud", virtual_tokens=4)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body: Any = {"model": "loud", "messages": [{"role": "user", "content": "abc"}]}
    *events, last, done = await stack.events("/v1/chat/completions", **body, stream_options=options)
    assert done == "[DONE]"
    usages = [event["usage"] for event in events]
    assert [usage["prompt_tokens"] for usage in usages] == [3] * len(events)
    assert [usage["prompt_tokens_details"]["virtual_tokens"] for usage in usages] == [4] * len(events)
    completed = [usage["completion_tokens"] for usage in usages]
    assert completed == sorted(completed)
    assert (completed[0], completed[-1]) == (0, last["usage"]["completion_tokens"])
    for alone in ({"continuous_usage_stats": True}, {"include_usage": True, "continuous_usage_stats": False}):
        events = await stack.events("/v1/chat/completions", **body, stream_options=alone)
        assert all(event.get("usage") is None for event in events[:-2])


async def test_openais_client_reads_the_stream(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=stack.base,
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    texts, usage = ["", ""], None
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert texts == ["hello", "hello"]
    assert usage is not None
    assert usage.completion_tokens == 10


async def test_prompt_ids_come_with_the_opening_chunk(stack: Any) -> None:
    body: Any = {"model": stack.base, "messages": [{"role": "user", "content": "ab"}], "return_token_ids": True}
    events = await stack.events("/v1/chat/completions", **body)
    with_usage = await stack.events("/v1/chat/completions", **body, stream_options={"include_usage": True})
    for first, second in ((events[0], events[1]), (with_usage[0], with_usage[1])):
        assert first["prompt_token_ids"] == [97, 98]
        assert "prompt_token_ids" not in second
    assert with_usage[0]["usage"] is None


async def test_what_is_no_object_is_told_to_be_one_in_our_words(stack: Any) -> None:
    answer = await stack.chat("hi", stream=True, stream_options="x")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "stream_options: should be an object"
