"""Who shares a question, and who must not."""

import asyncio

import pytest
from softprompt_gateway.coalesce import Coalesced


class Oracle:
    """Answers when told to, with the number of the question."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: list[asyncio.Future[str]] = []

    async def ask(self, key: str) -> str:
        self.asked.append(key)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    def answer(self, index: int) -> None:
        self.answers[index].set_result(f"{self.asked[index]} {index}")


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def coalesced(oracle: Oracle) -> Coalesced[str, str]:
    return Coalesced(oracle.ask)


async def test_those_who_come_together_share_a_question(oracle: Oracle, coalesced: Coalesced[str, str]) -> None:
    first, second, other = (asyncio.create_task(coalesced.get(key)) for key in ("a", "a", "b"))
    await turns()
    assert oracle.asked == ["a", "b"]
    oracle.answer(0)
    oracle.answer(1)
    assert await asyncio.gather(first, second, other) == ["a 0", "a 0", "b 1"]


async def test_whoever_comes_later_shares_the_next_question(
    oracle: Oracle, coalesced: Coalesced[str, str]
) -> None:
    first = asyncio.create_task(coalesced.get("a"))
    await turns()
    second, third = asyncio.create_task(coalesced.get("a")), asyncio.create_task(coalesced.get("a"))
    await turns()
    assert oracle.asked == ["a"]
    oracle.answer(0)
    await turns()
    assert oracle.asked == ["a", "a"]
    fourth = asyncio.create_task(coalesced.get("a"))
    await turns()
    oracle.answer(1)
    await turns()
    oracle.answer(2)
    assert await asyncio.gather(first, second, third, fourth) == ["a 0", "a 1", "a 1", "a 2"]


async def test_an_error_is_for_all_who_share_it_and_for_nobody_else(
    oracle: Oracle, coalesced: Coalesced[str, str]
) -> None:
    sharing = [asyncio.create_task(coalesced.get("a")) for _ in range(2)]
    await turns()
    later = asyncio.create_task(coalesced.get("a"))
    await turns()
    oracle.answers[0].set_exception(LookupError("no"))
    for task in sharing:
        with pytest.raises(LookupError, match="no"):
            await task
    await turns()
    oracle.answer(1)
    assert await later == "a 1"


async def test_one_who_leaves_takes_nothing_from_the_others(
    oracle: Oracle, coalesced: Coalesced[str, str]
) -> None:
    leaving, staying = (asyncio.create_task(coalesced.get("a")) for _ in range(2))
    await turns()
    leaving.cancel()
    await turns()
    oracle.answer(0)
    assert await staying == "a 0"
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_where_all_have_left_an_error_is_nobodys(oracle: Oracle, coalesced: Coalesced[str, str]) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    alone = asyncio.create_task(coalesced.get("a"))
    await turns()
    alone.cancel()
    await turns()
    oracle.answers[0].set_exception(LookupError("no"))
    await turns()
    del alone
    assert told == []
    again = asyncio.create_task(coalesced.get("a"))
    await turns()
    oracle.answer(1)
    assert await again == "a 1"
