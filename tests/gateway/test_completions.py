"""POST /v1/completions through OpenAI's client and by hand."""

from typing import Any

import openai
import pytest


async def test_a_prompt_is_completed(stack: Any, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model=stack.base, prompt="hello", max_tokens=100)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == stack.base
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3, "virtual_tokens": 0},
    }


async def test_sixteen_tokens_are_the_default(stack: Any) -> None:
    answer = (await stack.post("/v1/completions", model=stack.base, prompt="x" * 40)).json()
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_an_adapter_answers_under_its_name_and_says_its_version(stack: Any) -> None:
    await stack.registry.add("loud", virtual_tokens=7)
    second = await stack.registry.add("loud", virtual_tokens=9)
    response = await stack.complete("hello", model="loud")
    assert response.json()["choices"][0]["text"] == "HELLO"
    assert response.json()["model"] == "loud"
    assert response.json()["usage"]["prompt_tokens_details"]["virtual_tokens"] == 9
    assert response.headers["x-softprompt-adapter"] == "loud@2"
    assert response.headers["x-softprompt-adapter-digest"] == second.digest
    assert stack.inference.requests[-1].adapter == second.digest


@pytest.mark.parametrize("spelling", ["loud", "loud@1", "loud@latest", "acme/tiny-1:loud", "digest"])
async def test_every_spelling_of_an_adapter_is_understood(stack: Any, spelling: str) -> None:
    version = await stack.registry.add("loud")
    model = version.digest if spelling == "digest" else spelling
    assert (await stack.complete("hi", model=model)).headers["x-softprompt-adapter"] == "loud@1"


async def test_the_request_after_a_registration_gets_what_was_registered(stack: Any) -> None:
    for number in range(1, 6):
        await stack.registry.add("loud")
        assert (await stack.complete("hi", model="loud")).headers["x-softprompt-adapter"] == f"loud@{number}"


async def test_the_base_model_has_no_adapter_headers(stack: Any) -> None:
    assert "x-softprompt-adapter" not in (await stack.complete("hi")).headers


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
async def test_prompts_are_texts_or_ids_one_or_many(stack: Any, prompt: Any, texts: list[str]) -> None:
    answer = (await stack.complete(prompt)).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * len(texts)


async def test_choices_of_several_prompts_are_numbered_through(stack: Any) -> None:
    answer = (await stack.complete(["ab", "cd"], n=2, best_of=2)).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "cd"),
        (3, "cd"),
    ]


@pytest.mark.parametrize(("prompt", "text"), [("ab", "abab"), ([[97, 98], [99]], "abab")])
async def test_echo_puts_the_prompt_in_front(stack: Any, prompt: Any, text: str) -> None:
    assert (await stack.complete(prompt, echo=True)).json()["choices"][0]["text"] == text


async def test_echo_works_in_a_stream(stack: Any) -> None:
    events = await stack.events("/v1/completions", model=stack.base, prompt=["ab", "cd"], echo=True)
    texts = ["", ""]
    for event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["abab", "cdcd"]


def joined(events: list[Any], name: str) -> list[Any]:
    """What the pieces of a stream's first choice have of a list of its logprobs."""
    pieces = [event["choices"][0]["logprobs"] for event in events[:-1]]
    return [value for piece in pieces if piece for value in piece[name]]


async def test_echo_with_logprobs_tells_how_likely_the_prompt_is(stack: Any) -> None:
    choice = (await stack.complete("abc", echo=True, logprobs=1)).json()["choices"][0]
    assert choice["text"] == "abcabc"
    found = choice["logprobs"]
    assert found["tokens"] == ["a", "b", "c", "a", "b", "c"]
    assert found["token_logprobs"] == [None, -3.0, -4.0, -0.5, -0.5, -0.5]
    assert found["top_logprobs"][:3] == [None, {"A": -0.25, "b": -3.0}, {"A": -0.25, "c": -4.0}]
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5]


async def test_behind_a_soft_prompt_the_first_token_has_a_logprob(stack: Any) -> None:
    await stack.registry.add("loud")
    found = (await stack.complete("ab", model="loud", echo=True, logprobs=0)).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-2.0, -3.0, -0.5, -0.5]
    assert found["top_logprobs"][0] == {"a": -2.0}


@pytest.mark.parametrize(
    "fields", [{"logprobs": 1}, {"prompt_logprobs": 1}, {"logprobs": 0, "prompt_logprobs": 2}]
)
async def test_what_is_told_of_prompts_in_a_stream_is_what_is_told_whole(
    stack: Any, fields: dict[str, Any]
) -> None:
    asked = {"echo": True, "n": 2, "max_tokens": 2, "return_token_ids": True, **fields}
    whole = (await stack.complete(["abcde", "x"], **asked)).json()["choices"]
    events = await stack.events("/v1/completions", model=stack.base, prompt=["abcde", "x"], **asked)
    assert events[-1] == "[DONE]"
    for choice in whole:
        pieces = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        told = [piece["prompt_logprobs"] for piece in pieces if "prompt_logprobs" in piece]
        assert [each for piece in told for each in piece] == choice.get("prompt_logprobs", [])
        lists = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for piece in lists for value in piece[name]] == values
    # Each piece has the text of its tokens.
    with_both = [event["choices"][0] for event in events[:-1] if event["choices"][0]["logprobs"]]
    for piece in with_both:
        assert piece["text"] == "".join(piece["logprobs"]["tokens"])


@pytest.mark.parametrize("stream", [False, True])
async def test_without_tokens_the_answer_is_the_prompt(stack: Any, stream: bool) -> None:
    asked = {"echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        asked |= {"stream_options": {"include_usage": True}}
        events = await stack.events("/v1/completions", model=stack.base, prompt=[97, 98, 99], **asked)
        text = "".join(event["choices"][0]["text"] for event in events[:-2])
        logprobs, usage = joined(events[:-1], "token_logprobs"), events[-2]["usage"]
    else:
        answer = (await stack.complete([97, 98, 99], **asked)).json()
        text, usage = answer["choices"][0]["text"], answer["usage"]
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert (text, logprobs) == ("abc", [None, -3.0, -4.0])
    assert usage["completion_tokens"] == 0
    assert stack.inference.requests[-1].sampling.max_tokens == 0


async def test_prompt_logprobs_are_by_token_id_as_in_vllm(stack: Any) -> None:
    choice = (await stack.complete("ab", prompt_logprobs=1, max_tokens=1)).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("a", None)
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -3.0, "rank": None, "decoded_token": "b"},
            "65": {"logprob": -0.25, "rank": 1, "decoded_token": "A"},
        },
    ]
    assert "prompt_logprobs" not in (await stack.complete("ab")).json()["choices"][0]


async def test_offsets_are_characters_of_the_text(stack: Any) -> None:
    # The fake model's tokens are bytes: two of them are one character here.
    choice = (await stack.complete("né!", echo=True, logprobs=0, max_tokens=0)).json()["choices"][0]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]
    events = await stack.events(
        "/v1/completions", model=stack.base, prompt="né!", echo=True, logprobs=0, max_tokens=0
    )
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["n", "é!", ""]


async def test_the_best_are_the_likeliest_per_token_and_all_are_counted(stack: Any) -> None:
    answer = (await stack.complete(["rank", "rank"], n=2, best_of=5)).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "2"),
        (1, "1"),
        (2, "2"),
        (3, "1"),
    ]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == 10
    assert stack.inference.requests[-1].sampling.n == 5


async def test_the_best_are_told_with_their_logprobs_and_behind_their_echo(stack: Any) -> None:
    [choice] = (await stack.complete("rank", best_of=3, echo=True, logprobs=0)).json()["choices"]
    assert choice["text"] == "rank2"
    assert choice["logprobs"]["token_logprobs"][-1] == -0.5


async def test_a_stop_string_ends_the_text_and_is_told(stack: Any) -> None:
    choice = (await stack.complete("hello", stop="l")).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("he", "stop", "l")


@pytest.mark.parametrize(("logprobs", "top"), [(0, {"a": -0.5}), (2, {"a": -0.5, "b": -1.5})])
async def test_logprobs_are_parallel_lists(stack: Any, logprobs: int, top: dict[str, float]) -> None:
    found = (await stack.complete("abc", logprobs=logprobs)).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "c"]
    assert found["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert found["top_logprobs"][0] == top
    assert found["text_offset"] == [0, 1, 2]


async def test_streamed_logprobs_are_the_unstreamed_ones_in_pieces(stack: Any) -> None:
    whole = (await stack.complete("abc", logprobs=2)).json()["choices"][0]["logprobs"]
    events = await stack.events("/v1/completions", model=stack.base, prompt="abc", logprobs=2)
    pieces = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
    for name in whole:
        assert [value for piece in pieces for value in piece[name]] == whole[name]


async def test_token_ids_are_returned_where_asked_for(stack: Any) -> None:
    choice = (await stack.complete("abc", return_token_ids=True)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [97, 98, 99]
    assert choice["token_ids"] == [97, 98, 99]
    events = await stack.events("/v1/completions", model=stack.base, prompt="abc", return_token_ids=True)
    assert events[0]["choices"][0]["prompt_token_ids"] == [97, 98, 99]
    assert [event["choices"][0]["token_ids"] for event in events[1:4]] == [[97], [98], [99]]


async def test_every_sampling_field_reaches_the_inference_service(stack: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "min_p": 0.125,
        "seed": -7,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "stop_token_ids": [1, 2],
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
    }
    await stack.complete(
        "abc", **fields, stop=["x", "y"], logit_bias={"5": 1, "6": -2.5}, add_special_tokens=False
    )
    request = stack.inference.requests[-1]
    sent = {name: getattr(request.sampling, name) for name in fields}
    assert sent == fields
    assert list(request.sampling.stop) == ["x", "y"]
    assert dict(request.sampling.logit_bias) == {5: 1.0, 6: -2.5}
    assert request.sampling.max_tokens == 100
    assert request.add_special_tokens is False


async def test_null_means_the_default(stack: Any) -> None:
    response = await stack.complete(
        "abc", temperature=None, stop=None, n=None, stream=None, logit_bias=None, top_k=None
    )
    assert response.status_code == 200
    sampling = stack.inference.requests[-1].sampling
    assert sampling.n == 1
    # The model may recommend others than OpenAI's.
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert not sampling.HasField(name)


@pytest.mark.parametrize("gateway_settings", [{"unknown_fields": "warn"}])
async def test_of_very_many_unknown_fields_a_few_are_logged(stack: Any, logged: list[Any]) -> None:
    answer = await stack.complete("abc", **{f"odd{number}": 1 for number in range(1_000)})
    assert answer.status_code == 200
    assert len([line for line in logged if line["event"] == "unknown field"]) == 16


@pytest.mark.parametrize("gateway_settings", [{"unknown_fields": "warn"}])
async def test_where_a_setting_says_so_unknown_fields_are_left_out_and_logged(
    stack: Any, logged: list[Any]
) -> None:
    alone = (await stack.complete("abc")).json()["choices"]
    answer = await stack.complete("abc", use_beam_search=True, temperature=0)
    assert (answer.status_code, answer.json()["choices"]) == (200, alone)
    assert (await stack.chat("abc", documents=[{"text": "x"}])).status_code == 200
    responded = await stack.post("/v1/responses", model=stack.base, input="abc", odd=1)
    assert responded.status_code == 200
    fields = [line["field"] for line in logged if line["event"] == "unknown field"]
    assert fields == ["'use_beam_search'", "'documents'", "'odd'"]
    assert (await stack.complete("abc", temperature="warm", use_beam_search=True)).status_code == 400
    assert (await stack.post("/detokenize", tokens=[97], nonsense=1)).status_code == 400


SCHEMA = {"type": "object", "properties": {"odd": {"type": "string"}}}
CALLED = {"name": "f", "arguments": "{}", "odd": 1}
LEFT_OUT: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "/v1/chat/completions",
        {
            "odd": 1,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "abc", "cache_control": {}}], "odd": 1},
                {
                    "role": "assistant",
                    "content": "x",
                    "tool_calls": [{"id": "1", "type": "function", "odd": 1, "function": CALLED}],
                },
                {"role": "user", "content": "abc"},
            ],
            "tools": [{"type": "function", "odd": 1, "function": {"name": "f", "odd": 1, "parameters": SCHEMA}}],
            "tool_choice": {"type": "function", "odd": 1, "function": {"name": "f", "odd": 1}},
            "stream_options": None,
        },
        [
            *("odd", "messages.0.odd", "tools.0.odd", "tool_choice.odd", "messages.0.content.0.cache_control"),
            *("messages.1.tool_calls.0.odd", "tools.0.function.odd", "tool_choice.function.odd"),
            "messages.1.tool_calls.0.function.odd",
        ],
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "abc"}],
            "stream": True,
            "stream_options": {"include_usage": True, "odd": 1},
            "response_format": {
                "type": "json_schema",
                "odd": 1,
                "json_schema": {"name": "x", "schema": SCHEMA, "odd": 1},
            },
        },
        ["stream_options.odd", "response_format.odd", "response_format.json_schema.odd"],
    ),
    (
        "/v1/completions",
        {
            "prompt": [[{"type": "text", "text": "abc", "odd": 1}], [1, 2]],
            "structured_outputs": {"regex": "a", "odd": 1},
        },
        ["structured_outputs.odd", "prompt.0.0.odd"],
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "abc", "odd": 1}], "odd": 1},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "odd": 1},
                {"type": "function_call_output", "call_id": "1", "output": "abc", "odd": 1},
            ],
            "tools": [{"type": "function", "name": "f", "odd": 1}],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "odd": 1,
                "tools": [{"type": "function", "name": "f", "odd": 1}],
            },
        },
        [
            *("input.0.odd", "input.1.odd", "input.2.odd", "tools.0.odd", "tool_choice.odd"),
            *("input.0.content.0.odd", "tool_choice.tools.0.odd"),
        ],
    ),
    (
        "/v1/responses",
        {"input": "abc", "text": {"odd": 1, "format": {"type": "text", "odd": 1}}, "metadata": {"odd": "1"}},
        ["text.odd", "text.format.odd"],
    ),
]


@pytest.mark.parametrize("gateway_settings", [{"unknown_fields": "warn"}])
@pytest.mark.parametrize(("path", "body", "places"), LEFT_OUT)
async def test_unknown_fields_are_left_out_however_deep_they_are(
    stack: Any, logged: list[Any], path: str, body: dict[str, Any], places: list[str]
) -> None:
    answer = await stack.post(path, model=stack.base, **body)
    assert answer.status_code == 200, answer.text
    told = [line["field"] for line in logged if line["event"] == "unknown field"]
    assert sorted(told) == sorted(map(repr, places))
    if "tools" in body and path == "/v1/chat/completions":
        assert '"odd"' in stack.inference.requests[-1].chat.tools[0]  # what a schema says is its own


@pytest.mark.parametrize("gateway_settings", [{"unknown_fields": "warn"}])
async def test_lists_nested_as_deep_as_json_is_read_are_looked_through(stack: Any) -> None:
    deep: Any = {"odd": 1}
    for _ in range(900):
        deep = [deep]
    assert (await stack.complete(deep)).status_code == 400
    assert (await stack.post("/v1/chat/completions", model=stack.base, messages=deep)).status_code == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"odd": 1}, "unknown parameter 'odd' (--unknown-fields warn leaves it out)"),
        (
            {"stop_sequences": 1},
            "unknown parameter 'stop_sequences'; did you mean 'stop'? (--unknown-fields warn leaves it out)",
        ),
        ({"stream": True, "stream_options": {"odd": 1}}, "unknown parameter 'odd' (--unknown-fields warn"),
        ({"structured_outputs": {"odd": 1}}, "json_object (--unknown-fields warn leaves it out)"),
        ({"prompt": [{"type": "text", "text": "x", "odd": 1}]}, "'odd' (--unknown-fields warn leaves it out)"),
    ],
)
async def test_an_unknown_field_is_told_with_the_setting_that_leaves_it_out(
    stack: Any, fields: Any, message: str
) -> None:
    error = (await stack.complete(**{"prompt": "x"} | fields)).json()["error"]
    assert error["code"] == "unknown_parameter"
    assert message in error["message"]
    # Where the setting has no effect, nothing is told of it.
    assert "warn" not in (await stack.post("/tokenize", prompt="x", odd=1)).json()["error"]["message"]


async def test_fields_without_effect_are_accepted(stack: Any) -> None:
    fields = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    response = await stack.complete("abc", **fields, safety_identifier="s", prompt_cache_key="k")
    assert response.status_code == 200


async def test_one_failing_prompt_fails_the_request_and_ends_the_others(stack: Any) -> None:
    response = await stack.complete(["stall", "stall", "refuse OVERLOADED"])
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    await stack.inference.until(lambda fake: fake.running == 0)
    assert stack.inference.cancelled == 2


async def test_a_prompt_that_breaks_later_fails_the_request_and_ends_the_others(stack: Any) -> None:
    response = await stack.complete(["stall", "break DATA_CORRUPTED", "stall"])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "data_corrupted"
    await stack.inference.until(lambda fake: fake.running == 0)


async def test_the_request_id_is_passed_on(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "x"}
    response = await stack.http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert stack.inference.requests[-1].request_id == "mine-1"


async def test_an_adapter_deleted_between_lookup_and_use_is_an_unknown_model(stack: Any) -> None:
    response = await stack.complete("refuse ADAPTER_NOT_FOUND")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_streams_are_not_obfuscated(stack: Any, path: str) -> None:
    said = {
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/responses": {"input": "hi"},
    }[path]
    body = {"model": stack.base, "stream": True, **said}
    plain = await stack.post(path, **body, stream_options={"include_obfuscation": False})
    assert plain.status_code == 200, plain.text
    refused = await stack.post(path, **body, stream_options={"include_obfuscation": True})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "stream_options.include_obfuscation")
