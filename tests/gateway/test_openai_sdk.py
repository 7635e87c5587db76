"""Errors are raised by OpenAI's SDK as the classes that its users catch, and retried where that helps."""

from typing import Any

import openai
import pydantic
import pytest
from softprompt_api import errors
from softprompt_gateway.errors import ANSWERS, INTERNAL_MESSAGE

CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    410: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
}


@pytest.mark.parametrize("leaf", ANSWERS, ids=lambda leaf: leaf.__name__)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_is_raised_as_its_class(
    stack: Any, sdk: openai.AsyncOpenAI, leaf: type[errors.SoftpromptError], stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        await sdk.completions.create(model=stack.base, prompt=f"refuse {leaf.reason}", stream=stream)
    error, answer = raised.value, ANSWERS[leaf]
    # What the inference service does not know of an adapter is a model that is not found.
    code = "model_not_found" if leaf is errors.AdapterNotFound else answer.code
    assert type(error) is CLASSES[error.status_code]
    assert (error.status_code, error.type, error.code) == (answer.status, answer.type, code)
    assert error.request_id
    told = "refused as asked" if leaf is not errors.InternalError else INTERNAL_MESSAGE
    assert told in error.message


async def test_a_stream_that_breaks_off_raises_behind_what_came(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(model=stack.base, prompt="break OVERLOADED", stream=True)
    first = await anext(stream)
    assert first.choices[0].text == "b"
    with pytest.raises(openai.APIError) as raised:
        await anext(stream)
    assert (raised.value.code, raised.value.type) == ("overloaded", "server_error")


async def test_what_may_pass_is_tried_again_as_soon_as_the_server_says(stack: Any) -> None:
    refused = errors.RateLimited("too many", details={"retry_after_ms": "1"})
    stack.inference.failures = [refused, refused]
    async with stack.sdk(max_retries=2) as sdk:
        raw = await sdk.completions.with_raw_response.create(model=stack.base, prompt="hello")
    assert raw.retries_taken == 2
    assert raw.parse().choices[0].text == "hello"


class Weather(pydantic.BaseModel):
    city: str


PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "Weather", "arguments": {PARIS}}}\n</tool_call>'
TOOLS: Any = [openai.pydantic_function_tool(Weather)]


async def send_back(sdk: openai.AsyncOpenAI, model: str, message: Any) -> None:
    """As the client made it, and as whoever stores it dumps it."""
    dumped = (
        message.model_dump(warnings=False),
        message.model_dump(mode="json", exclude_none=True, warnings=False),
    )
    for sent in (message, *dumped):
        history: Any = [{"role": "user", "content": "x"}, sent, {"role": "user", "content": "and?"}]
        answer = await sdk.chat.completions.create(model=model, messages=history, tools=TOOLS)
        assert answer.choices[0].message.content == "and?"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client, over what it made itself
async def test_a_message_that_was_parsed_is_sent_back(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    asked: Any = [{"role": "user", "content": PARIS}]
    answer = await sdk.chat.completions.parse(model=stack.base, messages=asked, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Paris")
    await send_back(sdk, stack.base, answer.choices[0].message)
    assert stack.inference.requests[-1].chat.messages[1].content == PARIS


@pytest.mark.parametrize("streams", [False, True])
async def test_a_call_that_was_parsed_is_sent_back(stack: Any, sdk: openai.AsyncOpenAI, streams: bool) -> None:
    asked: Any = {"model": stack.base, "messages": [{"role": "user", "content": CALL}], "tools": TOOLS}
    if streams:
        async with sdk.chat.completions.stream(**asked) as stream:
            answer: Any = await stream.get_final_completion()
    else:
        answer = await sdk.chat.completions.parse(**asked)
    message = answer.choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    await send_back(sdk, stack.base, message)
    [call] = stack.inference.requests[-1].chat.messages[1].tool_calls
    assert (call.name, call.arguments) == ("Weather", PARIS)


async def test_a_message_added_up_from_deltas_is_sent_back(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    asked: Any = [{"role": "user", "content": CALL}]
    calls: dict[int, dict[str, Any]] = {}
    stream = await sdk.chat.completions.create(model=stack.base, messages=asked, tools=TOOLS, stream=True)
    async for chunk in stream:
        for piece in chunk.choices[0].delta.tool_calls or ():
            call = calls.setdefault(piece.index, piece.model_dump() | {"function": {"arguments": ""}})
            if piece.function is not None:
                call["function"]["name"] = piece.function.name or call["function"]["name"]
                call["function"]["arguments"] += piece.function.arguments or ""
    assert calls[0]["index"] == 0
    history: Any = [{"role": "assistant", "content": None, "tool_calls": list(calls.values())}, *asked]
    answer = await sdk.chat.completions.create(model=stack.base, messages=history)
    assert answer.choices[0].message.content == CALL
    assert stack.inference.requests[-1].chat.messages[0].tool_calls[0].arguments == PARIS
