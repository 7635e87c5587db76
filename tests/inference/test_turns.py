"""Whose turn it is: tenants', one after the other."""

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from softprompt_inference.turns import Places, line_up


@dataclass
class One:
    """Somebody, called by a tenant and a number: "a1"."""

    name: str

    @property
    def tenant(self) -> str:
        return self.name[0]


def lined_up(names: str) -> list[One]:
    line: list[One] = []
    for name in names.split():
        line_up(line, One(name))
    return line


@pytest.mark.parametrize(
    ("came", "turns"),
    [
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1 b2 c1", "a1 b1 c1 a2 b2 a3"),
        ("a1 b1 a2 b2 a3 a4 b3", "a1 b1 a2 b2 a3 b3 a4"),
    ],
)
def test_tenants_take_turns_and_each_ones_come_in_order(came: str, turns: str) -> None:
    assert " ".join(one.name for one in lined_up(came)) == turns


def test_who_asks_again_and_again_has_every_second_turn() -> None:
    line = lined_up("a1 a2 a3 a4 b1")
    had_turns = []
    for number in range(2, 5):
        had_turns += [line.pop(0).name, line.pop(0).name]
        line_up(line, One(f"b{number}"))
    assert " ".join(had_turns) == "a1 b1 a2 b2 a3 b3"


@pytest.mark.parametrize("seed", range(10))
def test_who_is_its_tenants_first_is_overtaken_by_nobody(seed: int) -> None:
    draw = random.Random(seed)
    line: list[One] = []
    for number in range(500):
        is_first = {one.tenant: one for one in reversed(line)}
        before = {one.name: line[: line.index(one)] for one in is_first.values()}
        line_up(line, One(f"{draw.choice('aaaabbc')}{number}"))
        assert all(line[: len(before[one.name])] == before[one.name] for one in is_first.values())
        for tenant in "abc":
            own = [int(one.name[1:]) for one in line if one.tenant == tenant]
            assert own == sorted(own)
        if draw.random() < 0.7:
            line.pop(0 if draw.random() < 0.5 else draw.randrange(len(line)))


@pytest.mark.parametrize("seed", range(10))
async def test_no_more_have_a_place_than_there_are_however_many_leave(seed: int) -> None:
    draw = random.Random(seed)
    places, num_taken = Places(2), 0
    served: Counter[str] = Counter()

    async def ask(tenant: str) -> None:
        nonlocal num_taken
        async with places.taken(tenant):
            num_taken += 1
            assert num_taken <= 2
            try:
                for _ in range(draw.randrange(3)):
                    await asyncio.sleep(0)
                served[tenant] += 1
            finally:
                num_taken -= 1

    tasks = []
    for _ in range(200):
        tasks.append(asyncio.create_task(ask(draw.choice("abc"))))
        if draw.random() < 0.4:
            draw.choice(tasks).cancel()
        if draw.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served.total() == sum(not task.cancelled() for task in tasks)
    async with contextlib.AsyncExitStack() as both, asyncio.timeout(5):
        await both.enter_async_context(places.taken("a"))
        await both.enter_async_context(places.taken("b"))
