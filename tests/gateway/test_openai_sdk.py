"""Errors are raised by OpenAI's SDK as the classes that its users catch, and retried where that helps."""

from typing import Any

import openai
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
