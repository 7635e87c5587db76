"""Structured outputs and tools from a running system, through OpenAI's client, with the default model."""

import concurrent.futures
import json
import re
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

USER: Any = [{"role": "user", "content": "Tell me about Paris."}]
MODEL = "tiny"
PATIENCE_S = 30.0
BRACES = {"107": 100, "109": 100}  # { and } in the model's vocabulary


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=12)
    population: int = pydantic.Field(ge=0, le=99_999_999)
    river: Literal["Seine", "Thames"] | None
    sights: list[Literal["tower", "museum"]] = pydantic.Field(max_length=3)


SCHEMA = City.model_json_schema()

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string", "maxLength": 12}},
        },
    },
}
STRICT: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
TIME: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "integer", "minimum": -12, "maximum": 12}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


class WeatherArguments(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: str = pydantic.Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


class TimeArguments(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    zone: int = pydantic.Field(ge=-12, le=12)


ARGUMENTS: dict[str, type[pydantic.BaseModel]] = {"get_weather": WeatherArguments, "get_time": TimeArguments}


@pytest.fixture(scope="module")
def client(demo_system: Any) -> Iterator[openai.OpenAI]:
    with demo_system.openai() as client:
        yield client


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, response_format=City, max_tokens=120, temperature=temperature, n=2, seed=1
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, City)


def test_a_stream_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=USER, response_format=City, max_tokens=120, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": r"[A-Z][a-z]{1,5} \d{2}"}, r"[A-Z][a-z]{1,5} \d{2}"),
        ({"grammar": 'start: "a" ("b" "a"){1,4}'}, "a(ba){1,4}"),
    ],
)
def test_a_completion_has_its_form(client: openai.OpenAI, form: Any, pattern: str) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["Paris is", "London is"],
        max_tokens=40,
        temperature=1.5,
        extra_body={"structured_outputs": form},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text)


def test_any_json_object_is_one(client: openai.OpenAI) -> None:
    """A small one: the model likes braces."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        response_format={"type": "json_object"},
        logit_bias=BRACES,
        max_tokens=20,
        temperature=0,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "") == {}


def test_free_answers_beside_forms_are_what_they_are_alone(client: openai.OpenAI) -> None:
    def free() -> str:
        answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=30, temperature=0)
        return answer.choices[0].message.content or ""

    def formed() -> str:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=USER,
            max_tokens=120,
            temperature=0,
            extra_body={"structured_outputs": {"json": SCHEMA}},
        )
        return answer.choices[0].message.content or ""

    alone = free()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        forms = [pool.submit(formed) for _ in range(4)]
        others = [pool.submit(free) for _ in range(4)]
        assert {other.result() for other in others} == {alone}
        for form in forms:
            City.model_validate_json(form.result())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_calls_that_must_come_do_and_follow_their_schemas(
    client: openai.OpenAI, choice: Any, temperature: float
) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        tools=[WEATHER, TIME],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=120,
        temperature=temperature,
        seed=3,
    )
    [one] = answer.choices
    assert one.finish_reason == "tool_calls"
    assert one.message.content is None
    [call] = one.message.tool_calls or []
    assert call.type == "function"
    if choice != "required":
        assert call.function.name == "get_weather"
    ARGUMENTS[call.function.name].model_validate_json(call.function.arguments)


def test_streamed_calls_are_put_together_by_openais_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=USER,
        tools=[STRICT],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        temperature=0,
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert final.choices[0].finish_reason == "tool_calls"
    WeatherArguments.model_validate_json(call.function.arguments)


def test_results_can_be_sent_back_and_answered(client: openai.OpenAI) -> None:
    messages = [*USER]
    first = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        temperature=0,
    )
    message = first.choices[0].message
    assert message.tool_calls
    messages.append(message.model_dump(exclude_none=True))
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'} for call in message.tool_calls
    ]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], max_tokens=20, temperature=0
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


class River(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    river: Literal["Seine", "Thames"]


def flat(tool: Any) -> Any:
    """A tool as `/v1/responses` spells it."""
    return {"type": "function", **tool["function"]}


def test_a_response_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model=MODEL,
        instructions="Answer in JSON.",
        input="Tell me about Paris.",
        text_format=City,
        max_output_tokens=120,
        extra_body={"seed": 1},
    )
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, City)


def test_a_response_is_what_chat_answers(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=12, temperature=0)
    answer = client.responses.create(model=MODEL, input=USER, max_output_tokens=12, temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.incomplete_details and answer.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert answer.usage is not None
    assert chat.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    with client.responses.stream(model=MODEL, input=USER, max_output_tokens=12, temperature=0) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == answer.output_text
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text


def test_calls_of_responses_are_streamed_and_answered(client: openai.OpenAI) -> None:
    conversation: Any = [*USER]
    with client.responses.stream(
        model=MODEL,
        input=conversation,
        tools=[flat(WEATHER), flat(TIME)],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=120,
        temperature=0,
    ) as stream:
        first = stream.get_final_response()
    [call] = first.output
    assert call.type == "function_call"
    WeatherArguments.model_validate_json(call.arguments)
    conversation += first.output
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'})
    fields: Any = {"model": MODEL, "temperature": 0}
    second = client.responses.create(
        input=conversation, tools=[flat(WEATHER), flat(TIME)], max_output_tokens=8, **fields
    )
    function: Any = {"name": call.name, "arguments": call.arguments}
    turns: Any = [
        *USER,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": '{"degrees": 21}'},
    ]
    chat = client.chat.completions.create(messages=turns, tools=[WEATHER, TIME], max_tokens=8, **fields)
    assert second.usage is not None
    assert chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens
    assert second.output_text == chat.choices[0].message.content


async def test_openais_async_client_gets_responses_too(demo_system: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{demo_system.url}/v1", api_key="unused", max_retries=0) as client:
        fields: Any = {"model": MODEL, "input": USER, "max_output_tokens": 40, "temperature": 0}
        answer = await client.responses.parse(text_format=River, **fields)
        async with client.responses.stream(text_format=River, **fields) as stream:
            final = await stream.get_final_response()
    assert isinstance(answer.output_parsed, River)
    assert final.output_parsed == answer.output_parsed


HOSTILE: list[Any] = [
    {"json": {"$ref": "#"}},
    {"json": {"type": "string", "pattern": "(((a{1,500}){1,500}){1,500})*"}},
    {"json": {"type": "robot"}},
    {"json": {"$ref": "http://127.0.0.1:1/x.json"}},
    {"regex": "(["},
    {"regex": "(((a{1000}){1000}){1000}){1000}"},
    {"grammar": "start: start"},
    {"grammar": "nothing"},
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_is_none_is_refused_soon_and_others_go_on(client: openai.OpenAI, stream: bool) -> None:
    began = time.monotonic()
    for form in HOSTILE:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(
                model=MODEL, prompt="x", stream=stream, extra_body={"structured_outputs": form}
            )
        assert caught.value.param == "structured_outputs"
        assert caught.value.code == "invalid_value"
    assert time.monotonic() - began < PATIENCE_S
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].finish_reason


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "robot"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/nothing"}}, "required": ["a"]},
    ],
)
def test_a_tool_that_no_call_can_follow_is_refused(client: openai.OpenAI, parameters: Any) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
