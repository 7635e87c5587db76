"""What all request models have in common."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from softprompt_gateway.adapters.schema import UpdateRequest
from softprompt_gateway.app import make_app
from softprompt_gateway.errors import Refused
from softprompt_gateway.openai.chat import ChatRequest
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.tokens import DetokenizeRequest
from softprompt_gateway.validation import RequestModel


def models(base: type[RequestModel] = RequestModel) -> Iterator[type[RequestModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def own_checks(model: type[RequestModel]) -> set[str]:
    decorators = model.__pydantic_decorators__
    return (decorators.field_validators.keys() | decorators.model_validators.keys()) & vars(model).keys()


def test_no_check_takes_the_place_of_an_inherited_one() -> None:
    # pydantic replaces a validator by one of the same name without a word, whatever fields either is for.
    checked = {
        (model, base): own_checks(model) & own_checks(base)
        for model in models()
        for base in model.__mro__[1:]
        if issubclass(base, RequestModel)
    }
    assert make_app is not None  # with it came every model
    assert any(own_checks(base) for _, base in checked)
    assert not {pair: names for pair, names in checked.items() if names}


MESSAGES = [{"role": "user", "content": "x"}]
NUM = 100_000
CHAT: dict[str, Any] = {"model": "m", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (ChatRequest, {"messages": MESSAGES, "tool_choice": 5}, "tool_choice"),
        (ChatRequest, {"messages": [{"content": "x"}]}, "messages.0.role"),
        (ChatRequest, {"messages": MESSAGES, "stop": ["a", 5]}, "stop.1"),
        (ChatRequest, {"messages": MESSAGES, "logit_bias": {"5": "x"}}, "logit_bias.5"),
        (ResponsesRequest, {"input": [{"role": "user", "content": "x", "name": 5}]}, "input.0.name"),
        (ResponsesRequest, {"input": [{"role": "user"}]}, "input.0.content"),
    ],
)
def test_an_error_names_what_is_in_the_request(model: type[RequestModel], fields: Any, param: str) -> None:
    # pydantic also names the kind that it took a value for.
    with pytest.raises(Refused) as refused:
        model.checked({"model": "m", **fields})
    assert refused.value.body.param == param


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (ChatRequest, {**CHAT, "stop": [1] * NUM}, "stop"),
        (ChatRequest, {**CHAT, "stop_token_ids": [""] * NUM}, "stop_token_ids"),
        (ChatRequest, {**CHAT, "logit_bias": {str(key): "" for key in range(NUM)}}, "logit_bias"),
        (ChatRequest, {**CHAT, **{f"x{key}": 1 for key in range(NUM)}}, "x0"),
        (ChatRequest, {"model": "m", "messages": [{f"x{key}": 1 for key in range(NUM)}]}, "messages.0.role"),
        (
            ResponsesRequest,
            {"model": "m", "input": "x", "metadata": {str(key): 1 for key in range(NUM)}},
            "metadata",
        ),
        (DetokenizeRequest, {"tokens": [-1] * NUM}, "tokens.0"),
        (UpdateRequest, {"labels": {str(key): 1 for key in range(NUM)}}, "labels"),
    ],
)
def test_of_very_much_that_is_wrong_little_is_told(model: type[RequestModel], fields: Any, param: str) -> None:
    with pytest.raises(ValidationError) as told:
        model.model_validate(fields)
    assert told.value.error_count() < 5
    with pytest.raises(Refused) as refused:
        model.checked(fields)
    assert refused.value.body.param == param
