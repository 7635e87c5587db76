import asyncio
import gc

import pytest
from softprompt_api.waiting import wait_for_shared


@pytest.fixture
async def complaints() -> list[object]:
    """What asyncio would log."""
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    return told


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_all_who_wait_have_the_result_or_the_error() -> None:
    for outcome in ("said", LookupError("no")):
        work = asyncio.get_running_loop().create_future()
        waiting = [asyncio.create_task(wait_for_shared(work)) for _ in range(2)]
        await turns()
        if isinstance(outcome, str):
            work.set_result(outcome)
        else:
            work.set_exception(outcome)
        assert await asyncio.gather(*waiting, return_exceptions=True) == [outcome, outcome]


async def test_who_leaves_does_not_end_it_for_others(complaints: list[object]) -> None:
    work = asyncio.get_running_loop().create_future()
    leaving, staying = (asyncio.create_task(wait_for_shared(work)) for _ in range(2))
    await turns()
    leaving.cancel()
    await turns()
    assert leaving.cancelled()
    assert not work.cancelled()
    work.set_exception(LookupError("no"))
    with pytest.raises(LookupError):
        await staying
    assert complaints == []


async def test_an_error_is_nobodys_where_all_have_left(complaints: list[object]) -> None:
    async def fail(when: asyncio.Event) -> None:
        await when.wait()
        raise LookupError("no")

    when = asyncio.Event()
    work = asyncio.create_task(fail(when))
    alone = asyncio.create_task(wait_for_shared(work))
    await turns()
    alone.cancel()
    await turns()
    when.set()
    await turns()
    del work, alone
    gc.collect()
    assert complaints == []


async def test_work_that_is_cancelled_is_so_for_who_waits() -> None:
    work = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(wait_for_shared(work))
    await turns()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
