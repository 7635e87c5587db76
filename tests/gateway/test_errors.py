"""The table of errors is total, and its answers have OpenAI's shape."""

import json

import pytest
from softprompt_api import errors
from softprompt_api.rpc.status import CODES
from softprompt_gateway.errors import ANSWERS, INTERNAL_MESSAGE, Refused, describe


def _leaves(root: type[errors.SoftpromptError]) -> set[type[errors.SoftpromptError]]:
    return {root}.union(*(_leaves(leaf) for leaf in root.__subclasses__()))


def test_every_error_has_an_answer() -> None:
    assert set(ANSWERS) == _leaves(errors.SoftpromptError) - {errors.SoftpromptError} == set(CODES)


@pytest.mark.parametrize("leaf", ANSWERS)
def test_an_answer_has_openais_shape(leaf: type[errors.SoftpromptError]) -> None:
    body = describe(leaf("what was wrong", field="prompt"))
    error = json.loads(body.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    answer = ANSWERS[leaf]
    assert (answer.type == "server_error") == (answer.status >= 500)
    assert body.response().status_code == answer.status


@pytest.mark.parametrize("leaf", [errors.Overloaded, errors.Unavailable, errors.BaseModelUnknown])
def test_what_may_pass_says_when_to_try_again(leaf: type[errors.SoftpromptError]) -> None:
    assert int(describe(leaf("later")).response().headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "error", [errors.InternalError("in /etc/passwd"), RuntimeError("in /etc/passwd"), KeyError()]
)
def test_a_defects_own_words_are_never_told(error: Exception) -> None:
    assert describe(error).message == INTERNAL_MESSAGE


def test_a_refusal_carries_its_headers() -> None:
    response = describe(Refused("no", code="x", status=405, headers={"allow": "GET"})).response()
    assert response.headers["allow"] == "GET"
