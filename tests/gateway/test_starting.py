"""Requests are begun with the versions last heard of, and answered with those that the registry tells."""

import asyncio
from typing import Any

import pytest
from softprompt_api.errors import AdapterNotFound, Unavailable

DIGEST = "x-softprompt-adapter-digest"


@pytest.fixture
async def told(stack: Any) -> Any:
    """The stack, whose gateway has heard of `loud@1`, and of the model."""
    version = await stack.registry.add("loud")
    await stack.until_listed("loud")
    stack.registry.asked.clear()
    return version


async def _begun(stack: Any, prompt: str, *, stream: bool = False) -> "asyncio.Task[Any]":
    """A request that the inference service has, while the registry does not answer."""
    stack.registry.answers.clear()
    task = asyncio.create_task(stack.complete(prompt, model="loud", stream=stream))
    await stack.inference.until(lambda fake: fake.requests)
    return task


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_begun_while_the_registry_is_asked(stack: Any, told: Any, stream: bool) -> None:
    request = await _begun(stack, "hi", stream=stream)
    await stack.inference.until(lambda fake: not fake.running)
    assert not request.done()
    stack.registry.answers.set()
    answer = await request
    assert (answer.status_code, answer.headers[DIGEST]) == (200, told.digest)
    assert "HI" in answer.text or '"H"' in answer.text
    assert [one.adapter for one in stack.inference.requests] == [told.digest]
    assert stack.registry.asked == ["loud"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_version_that_was_not_heard_of_yet_answers(stack: Any, told: Any, stream: bool) -> None:
    stack.registry.silent = True
    newer = await stack.registry.add("loud")
    request = await _begun(stack, "hi", stream=stream)
    stack.registry.answers.set()
    answer = await request
    assert (answer.status_code, answer.headers[DIGEST]) == (200, newer.digest)
    assert [one.adapter for one in stack.inference.requests] == [told.digest, newer.digest]


async def test_what_was_begun_with_another_version_is_cancelled(stack: Any, told: Any) -> None:
    stack.registry.silent = True
    request = await _begun(stack, "wait")
    del stack.registry.versions["loud"]
    stack.registry.answers.set()
    answer = await request
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    await stack.inference.until(lambda fake: fake.cancelled == 1)
    assert stack.inference.running == 0


async def test_what_fails_with_another_version_is_no_answer(stack: Any, told: Any) -> None:
    stack.registry.silent = True
    request = await _begun(stack, "refuse OVERLOADED")
    newer = await stack.registry.add("loud")
    stack.registry.answers.set()
    assert (await request).status_code == 503
    assert [one.adapter for one in stack.inference.requests] == [told.digest, newer.digest]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_version_that_is_no_more_is_no_answer_where_the_name_has_another(
    stack: Any, told: Any, stream: bool
) -> None:
    stack.registry.silent = True
    del stack.registry.versions["loud"]
    newer = await stack.registry.add("loud")
    stack.inference.failures = [AdapterNotFound("there is no such adapter")]
    request = await _begun(stack, "hi", stream=stream)
    stack.registry.answers.set()
    answer = await request
    assert (answer.status_code, answer.headers[DIGEST]) == (200, newer.digest)
    assert [one.adapter for one in stack.inference.requests] == [told.digest, newer.digest]
    stack.registry.error = Unavailable("away")
    assert (await stack.complete("hi", model="loud")).headers[DIGEST] == newer.digest  # what was told was learned


async def test_a_version_that_only_the_registry_has_is_not_found(stack: Any, told: Any) -> None:
    stack.inference.failures = [AdapterNotFound("there is no such adapter")]
    answer = await stack.complete("hi", model="loud")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_what_fails_with_the_same_version_is_the_answer(stack: Any, told: Any) -> None:
    request = await _begun(stack, "refuse OVERLOADED")
    stack.registry.answers.set()
    answer = await request
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert len(stack.inference.requests) == 1


async def test_whoever_leaves_before_the_registry_answers_cancels_what_was_begun(stack: Any, told: Any) -> None:
    request = await _begun(stack, "wait")
    request.cancel()
    await stack.inference.until(lambda fake: fake.cancelled == 1)
    stack.registry.answers.set()


async def test_an_unknown_adapter_is_asked_for_first(stack: Any, told: Any) -> None:
    stack.registry.silent = True
    other = await stack.registry.add("quiet")
    answer = await stack.complete("hi", model="quiet")
    assert (answer.status_code, answer.headers[DIGEST]) == (200, other.digest)
    assert [one.adapter for one in stack.inference.requests] == [other.digest]


@pytest.mark.parametrize("gateway_settings", [{"registry_timeout_s": 0.2}])
async def test_a_registry_that_let_one_question_time_out_is_not_waited_for_until_it_answers(
    stack: Any, told: Any
) -> None:
    quiet = await stack.registry.add("quiet")
    await stack.until_listed("loud", "quiet")
    stack.registry.answers.clear()
    assert (await stack.complete("hi", model="loud")).status_code == 200
    for model in ("quiet", "quiet@1", quiet.digest):
        assert (await stack.complete("hi", model=model)).headers[DIGEST] == quiet.digest
    assert set(stack.registry.asked) == {"loud"}
    unknown = await stack.complete("hi", model="unknown")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (504, "deadline_exceeded")
    stack.registry.answers.set()
    async with asyncio.timeout(10):
        while "quiet" not in stack.registry.asked:
            assert (await stack.complete("hi", model="quiet")).status_code == 200


async def test_nor_is_one_that_took_long_to_say_that_its_store_is_away(
    stack: Any, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_gateway.resolve._LONG_S", 0.0)
    quiet = await stack.registry.add("quiet")
    await stack.until_listed("loud", "quiet")
    stack.registry.error = Unavailable("the store is away")
    assert (await stack.complete("hi", model="loud")).status_code == 200
    stack.registry.answers.clear()
    stack.registry.error = None
    assert (await stack.complete("hi", model="quiet")).headers[DIGEST] == quiet.digest
    assert "quiet" not in stack.registry.asked
    stack.registry.answers.set()
