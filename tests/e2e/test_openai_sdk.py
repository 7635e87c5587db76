"""OpenAI's Python SDK against a running system: every route it has here, in both of its clients."""

import inspect
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pydantic
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MODEL = "tiny"
PROMPT = "The quick brown fox"
IDS = [504, 2365, 6354, 16438]
USER: Any = [{"role": "user", "content": "Hello"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 6}


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=6)
    size: int = pydantic.Field(ge=0, le=9)
    kind: Literal["big", "small"]


class Lookup(pydantic.BaseModel):
    """Look a word up."""

    model_config = pydantic.ConfigDict(extra="forbid")

    word: str = pydantic.Field(max_length=6)


@pytest.fixture(params=[openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])
async def client(request: pytest.FixtureRequest, small_system: Any) -> AsyncIterator[Any]:
    client = request.param(base_url=f"{small_system.url}/v1", api_key="unused", max_retries=0, timeout=60)
    yield client
    await settled(client.close())


async def settled(result: Any) -> Any:
    """What a call of either client comes to."""
    return await result if inspect.isawaitable(result) else result


async def items(stream: Any) -> list[Any]:
    """All that a stream or a page of either client has."""
    return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


async def followed(manager: Any) -> tuple[list[Any], Any]:
    """The events of a streaming helper, and what they come to."""
    if hasattr(manager, "__aenter__"):
        async with manager as stream:
            return [event async for event in stream], await stream.get_final_completion()
    with manager as stream:
        return list(stream), stream.get_final_completion()


async def complete(client: Any, **body: Any) -> Any:
    return await settled(client.completions.create(**{"model": MODEL, "prompt": PROMPT, **GREEDY, **body}))


async def chat(client: Any, **body: Any) -> Any:
    return await settled(client.chat.completions.create(**{"model": MODEL, "messages": USER, **GREEDY, **body}))


async def test_models_are_listed_on_one_page_and_looked_up(client: Any) -> None:
    page = await settled(client.models.list())
    assert not page.has_next_page()
    assert page.object == "list"
    ids = [model.id for model in page.data]
    assert ids[0] == MODEL
    assert {"first", "second", "third"} <= set(ids)
    assert [model.id for model in await items(client.models.list())] == ids
    for name in (MODEL, "first", "first@1", "tiny:first"):
        model = await settled(client.models.retrieve(name))
        assert (model.id, model.object, model.owned_by) == (name, "model", "softprompt")


@pytest.mark.parametrize(
    ("prompt", "num_choices"), [(PROMPT, 1), ([PROMPT, "Hello"], 2), (IDS, 1), ([IDS, IDS[:2], IDS], 3)]
)
async def test_prompts_of_every_form_are_completed(client: Any, prompt: Any, num_choices: int) -> None:
    answer = await complete(client, prompt=prompt, n=2, logprobs=1, seed=7, temperature=1)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == list(range(2 * num_choices))
    for choice in answer.choices:
        assert choice.finish_reason in ("length", "stop")
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) >= 1
        told = zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
        assert all(top[token] <= 0 for token, top in told)
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.completion_tokens <= 6 * 2 * num_choices


async def test_a_streamed_completion_is_the_whole_one(client: Any) -> None:
    whole = await complete(client, model="first")
    chunks = await items(
        await complete(client, model="first", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_a_conversation_of_every_role_is_continued(client: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hello!", "refusal": None},
        {"role": "user", "content": "Again", "name": "me"},
    ]
    answer = await chat(client, messages=messages, n=2, logprobs=True, top_logprobs=2)
    first, second = answer.choices
    assert first.message.content == second.message.content
    assert (first.message.role, first.message.refusal) == ("assistant", None)
    for token in first.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob
    told = b"".join(bytes(token.bytes) for token in first.logprobs.content)
    assert told.decode(errors="replace").startswith(first.message.content)
    again = [*messages, first.message.model_dump(), {"role": "user", "content": "And again"}]
    assert (await chat(client, messages=again)).choices[0].message.content is not None


async def test_the_streaming_helper_tells_content_and_logprobs(client: Any) -> None:
    # The helper takes no answer that was cut, and this model would never end one by itself.
    word = {"structured_outputs": {"regex": "[a-z]{4,8}"}}
    asked: Any = {"model": MODEL, "messages": USER, "logprobs": True, "temperature": 0, "extra_body": word}
    whole = await settled(client.chat.completions.create(**asked))
    events, final = await followed(client.chat.completions.stream(**asked))
    content = whole.choices[0].message.content
    assert final.choices[0].message.content == content
    assert "".join(event.delta for event in events if event.type == "content.delta") == content
    assert [event.content for event in events if event.type == "content.done"] == [content]
    told = [token.token for event in events if event.type == "logprobs.content.delta" for token in event.content]
    assert told == [token.token for token in whole.choices[0].logprobs.content]
    assert [event.type for event in events].count("logprobs.content.done") == 1


async def test_an_answer_is_parsed_whole_and_streamed(client: Any) -> None:
    asked: Any = {"model": MODEL, "messages": USER, "response_format": Answer, "temperature": 0, "max_tokens": 80}
    whole = await settled(client.chat.completions.parse(**asked))
    assert isinstance(whole.choices[0].message.parsed, Answer)
    events, final = await followed(client.chat.completions.stream(**asked))
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert [event.parsed for event in events if event.type == "content.done"] == [final.choices[0].message.parsed]


async def test_a_call_is_parsed_whole_and_streamed(client: Any) -> None:
    tool = openai.pydantic_function_tool(Lookup)
    choice = {"type": "function", "function": {"name": "Lookup"}}
    asked: Any = {"model": MODEL, "messages": USER, "tools": [tool], "tool_choice": choice, "temperature": 0}
    whole = await settled(client.chat.completions.parse(**asked, max_tokens=80))
    [call] = whole.choices[0].message.tool_calls
    assert (whole.choices[0].finish_reason, call.type, call.function.name) == ("tool_calls", "function", "Lookup")
    assert isinstance(call.function.parsed_arguments, Lookup)
    events, final = await followed(client.chat.completions.stream(**asked, max_tokens=80))
    [done] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert json.loads(done.arguments) == json.loads(call.function.arguments)
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(piece.arguments_delta for piece in pieces) == done.arguments
    [streamed] = final.choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "a word"}
    kept = whole.choices[0].message.model_dump(
        exclude={"tool_calls": {"__all__": {"function": {"parsed_arguments"}}}}
    )
    kept.pop("parsed", None)
    again = await chat(client, messages=[*USER, kept, result], tools=[tool])
    assert again.choices[0].finish_reason in ("length", "stop", "tool_calls")


async def test_what_is_cut_short_is_not_parsed(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        await settled(
            client.chat.completions.parse(model=MODEL, messages=USER, response_format=Answer, max_tokens=3)
        )


async def test_a_raw_response_has_the_headers_and_the_answer(client: Any) -> None:
    raw = await settled(
        client.completions.with_raw_response.create(
            model="second", prompt=PROMPT, extra_headers={"x-request-id": "mine"}, **GREEDY
        )
    )
    assert raw.headers["x-softprompt-adapter"] == "second@1"
    answer = raw.parse()
    assert raw.request_id == answer._request_id == "mine"
    assert answer.usage.prompt_tokens_details.model_dump()["virtual_tokens"] == 16
    assert (await complete(client, model="second")).choices[0].text == answer.choices[0].text


async def test_a_response_is_read_while_it_comes(client: Any) -> None:
    manager = client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=USER, stream=True, **GREEDY
    )
    if hasattr(manager, "__aenter__"):
        async with manager as response:
            lines = [line async for line in response.iter_lines()]
    else:
        with manager as response:
            lines = list(response.iter_lines())
    told = [line for line in lines if line]
    assert told[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in told[:-1])


@pytest.mark.parametrize(
    ("body", "kind", "code", "param"),
    [
        ({"model": "secnd"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"prompt": ""}, openai.BadRequestError, "invalid_value", "prompt"),
        ({"prompt": [5] * 318}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"suffix": "!"}, openai.BadRequestError, "unsupported_parameter", "suffix"),
        ({"extra_body": {"max_new_tokens": 3}}, openai.BadRequestError, "unknown_parameter", "max_new_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_raises_its_error(
    client: Any, body: Any, kind: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(kind) as raised:
        await complete(client, **body, stream=stream)
    error = raised.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert error.request_id
    assert error.body is not None


async def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await settled(client.models.retrieve("nobody"))
    assert raised.value.code == "model_not_found"


async def test_further_routes_are_reached_through_the_client(client: Any, small_system: Any) -> None:
    """OpenAI's clients have `get` and `post` for what they have no names for."""
    body = {"model": "second", "prompt": PROMPT}
    tokens = await settled(client.post(f"{small_system.url}/tokenize", body=body, cast_to=object))
    assert (tokens["tokens"], tokens["virtual_tokens"]) == (IDS, 16)
    text = await settled(client.post(f"{small_system.url}/detokenize", body={"tokens": IDS}, cast_to=object))
    assert text == {"prompt": PROMPT}
    listed = await settled(client.get("/adapters", cast_to=object))
    assert {"first", "second", "third"} <= {version["name"] for version in listed["data"]}
    with pytest.raises(openai.NotFoundError) as raised:
        await settled(client.get("/nothing", cast_to=object))
    assert raised.value.code == "not_found"
