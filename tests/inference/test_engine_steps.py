"""Work beside steps: one piece for each that ends, and none waits where nothing is held up."""

import asyncio

import pytest
from softprompt_inference.engine import steps as steps_module
from softprompt_inference.engine.steps import FREE_STEPS, Steps


@pytest.fixture
def steps() -> Steps:
    return Steps(lambda: True)


async def begin(steps: Steps, count: int) -> list["asyncio.Task[None]"]:
    """Tasks that wait, in order."""
    waiting = [asyncio.create_task(steps.next()) for _ in range(count)]
    await asyncio.sleep(0)
    return waiting


async def ended(waiting: list["asyncio.Task[None]"]) -> list[bool]:
    for _ in range(3):
        await asyncio.sleep(0)
    return [task.done() for task in waiting]


async def test_the_end_of_a_step_lets_the_first_go_on_who_waits(steps: Steps) -> None:
    waiting = await begin(steps, 3)
    assert await ended(waiting) == [False, False, False]
    steps.end()
    assert await ended(waiting) == [True, False, False]
    steps.end()
    steps.end()
    steps.end()
    assert await ended(waiting) == [True, True, True]


async def test_a_step_that_ended_before_is_not_the_next(steps: Steps) -> None:
    steps.end()
    waiting = await begin(steps, 1)
    assert await ended(waiting) == [False]
    steps.end()
    await waiting[0]


async def test_who_has_gone_takes_no_turn(steps: Steps) -> None:
    waiting = await begin(steps, 2)
    waiting[0].cancel()
    steps.end()
    assert await ended(waiting) == [True, True]


async def test_nobody_waits_where_nothing_is_held_up() -> None:
    async with asyncio.timeout(0):
        await FREE_STEPS.next()


async def test_an_engine_that_computes_nothing_after_all_is_not_waited_for_for_long(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "_MAX_WAIT_S", 0.0)
    await steps.next()
    steps.end()  # nobody is left who waits
    assert steps.are_held_up()
