"""Whose turn it is."""

import random
from collections import Counter

import pytest
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import AddRequest, TextPart
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.engine.sequence import Sequence
from softprompt_inference.engine.waiting import WaitingLine


@pytest.fixture
def line() -> WaitingLine:
    return WaitingLine()


@pytest.fixture
def sequence(fakes):
    """A sequence of a tenant, called by its tenant and a number: "a1"."""

    def make(name: str) -> Sequence:
        request = AddRequest(
            request_id=name,
            prompt=[TextPart(token_ids=[1])],
            params=fakes.request("0", [1]).params,
            tenant=name[0],
        )
        return make_sequence(request, virtual_ids=VirtualIds(50), lora_slots=LoraSlots(0), max_model_len=32)

    return make


def names(line: WaitingLine) -> str:
    line.check()
    return " ".join(sequence.request.request_id for sequence in line)


def started(line: WaitingLine, count: int) -> str:
    return " ".join(line.start().request.request_id for _ in range(count))


def test_one_tenants_start_in_order_of_arrival(line, sequence) -> None:
    for name in ("a1", "a2", "a3"):
        line.add(sequence(name))
    assert started(line, 3) == "a1 a2 a3"
    assert len(line) == 0


def test_many_of_one_tenant_hold_up_none_of_another(line, sequence) -> None:
    for number in range(1, 5):
        line.add(sequence(f"a{number}"))
    for name in ("b1", "b2", "c1"):
        line.add(sequence(name))
    assert names(line) == "a1 b1 c1 a2 b2 a3 a4"


def test_nobody_saves_up_turns_by_not_asking(line, sequence) -> None:
    for number in range(1, 7):
        line.add(sequence(f"a{number}"))
    assert started(line, 4) == "a1 a2 a3 a4"
    for name in ("b1", "b2", "b3"):
        line.add(sequence(name))
    assert names(line) == "a5 b1 a6 b2 b3"


def test_what_was_asked_before_others_came_costs_no_turn_later(line, sequence) -> None:
    for number in range(1, 5):
        line.add(sequence(f"a{number}"))
    for waiting in list(line):  # their clients leave
        line.remove(waiting)
    for name in ("b1", "a5", "b2", "a6"):
        line.add(sequence(name))
    assert names(line) == "b1 a5 b2 a6"


def test_who_had_started_goes_first(line, sequence) -> None:
    for name in ("a1", "a2", "b1"):
        line.add(sequence(name))
    first, second = line.start(), line.start()
    line.put_back(second)
    line.put_back(first)
    line.add(sequence("c1"))
    assert names(line) == "a1 b1 a2 c1"


def test_newcomers_do_not_overtake_who_starts_again(line, sequence) -> None:
    for number in range(1, 4):
        line.add(sequence(f"a{number}"))
    first, second, third = (line.start() for _ in range(3))
    line.put_back(third)
    line.put_back(second)
    assert line.start() is second
    line.check([first, second, third])
    line.add(sequence("b1"))
    assert names(line) == "a3 b1"
    line.add(sequence("c1"))
    assert names(line) == "a3 b1 c1"


def test_over_any_time_in_which_they_wait_tenants_start_alike(line, sequence) -> None:
    draw = random.Random(7)
    waiting, begun, number = Counter(), Counter(), 0
    for _ in range(2000):
        tenant = draw.choice("aaaaaaaabbc")
        if draw.random() < 0.6:
            number += 1
            line.add(sequence(f"{tenant}{number}"))
            waiting[tenant] += 1
        elif len(line):
            name = line.start().request.request_id[0]
            waiting[name] -= 1
            begun[name] += 1
        line.check()
    assert waiting["a"] > waiting["b"] >= 0
    # c asks the least and never waits for a's many.
    assert waiting["c"] <= 2


def test_tenants_that_are_gone_are_forgotten_though_somebody_always_waits(line, sequence) -> None:
    line.add(sequence("z0"))
    for number in range(1000):
        line.add(sequence(chr(0x4E00 + number) + "1"))
        line.start()
    assert len(line) == 1
    assert len(line._last_turns) < 100
