"""Which grammars are refused, by processes that end with what takes too much."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument, Overloaded, Unavailable
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.grammar import checking
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model

VOCAB_SIZE = 49152
PATIENCE_S = 60.0

# None of these ends by itself in minutes.
ENDLESS: dict[str, dict[str, Any]] = {
    "parametric rules": {"grammar": "start: s::0\ns::_: s::incr(_)"},
    "a conjunction": {"grammar": "start: A\nA: " + " & ".join(f"/(a|b)*a(a|b){{{n}}}/" for n in range(40))},
    "all of many patterns": {
        "json": {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(60)]}
    },
}


@pytest.fixture
async def checks() -> AsyncIterator[GrammarChecks]:
    checks = GrammarChecks(resolve_model(DEFAULT_MODEL), vocab_size=VOCAB_SIZE, max_cpu_s=1)
    yield checks
    await checks.close()


def wanted(**kind: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**kind)


async def until_it_works(checks: GrammarChecks) -> None:
    """Return when the one process that was idle has been given a grammar."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not checks._idle


async def test_what_can_be_followed_is_let_pass_and_what_cannot_is_refused_with_the_reason(
    checks: GrammarChecks,
) -> None:
    for _ in range(2):  # also when it is known
        await checks.check(wanted(json={"type": "object", "properties": {"a": {"type": "string"}}}))
        with pytest.raises(InvalidArgument, match=r"regex cannot be followed: .*look") as refused:
            await checks.check(wanted(regex="(?=a)b"))
        assert refused.value.field == "structured_outputs"
    assert len(checks._idle) == 1  # one process was enough


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_takes_too_much_is_refused_and_keeps_nobody_waiting(checks: GrammarChecks, name: str) -> None:
    endless = asyncio.create_task(checks.check(wanted(**ENDLESS[name])))
    async with asyncio.timeout(PATIENCE_S):
        await checks.check(wanted(choice=["yes", "no"]))
        with pytest.raises(InvalidArgument, match=r"more than 1 s or 512 MiB to compile; make it simpler"):
            await endless
    with pytest.raises(InvalidArgument, match="make it simpler"):  # at once: it is known
        async with asyncio.timeout(1):
            await checks.check(wanted(**ENDLESS[name]))
    await checks.check(wanted(regex="ab*"))


async def test_what_takes_too_much_for_all_choices_together_is_refused(checks: GrammarChecks) -> None:
    """The engine compiles it for each of them."""
    large = wanted(json={"anyOf": [{"const": f"value {number}"} for number in range(500)]})
    await checks.check(large)
    [seconds] = checks._verdicts.values()
    assert isinstance(seconds, float)
    await checks.check(large, num_choices=int(1 / seconds))
    with pytest.raises(InvalidArgument, match=r"choices together more than 1 s; .* ask for fewer") as refused:
        await checks.check(large, num_choices=int(1 / seconds) + 1)
    assert refused.value.field == "structured_outputs"


async def test_the_same_grammar_is_checked_once_for_all_who_wait(checks: GrammarChecks) -> None:
    same = wanted(json={"type": "integer"})
    await asyncio.gather(*(checks.check(same) for _ in range(8)))
    assert len(checks._idle) == 1


async def test_a_check_ends_with_the_last_who_waits(checks: GrammarChecks) -> None:
    await checks.check(wanted(choice=["yes"]))
    [process] = checks._idle
    endless = wanted(**ENDLESS["parametric rules"])
    waiting = [asyncio.create_task(checks.check(endless)) for _ in range(2)]
    await until_it_works(checks)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert process.returncode is None
    waiting[1].cancel()
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() < 0
    assert checks._checks == {}
    await checks.check(wanted(regex="ab*"))


async def test_who_waits_too_long_for_others_is_told_to_come_back(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_PATIENCE_S", 0.05)
    async with checks._turns, checks._turns:  # as many as there may be
        with pytest.raises(Overloaded, match="try again later"):
            await checks.check(wanted(regex="a"))


async def test_a_process_that_was_killed_is_nobodys_fault(checks: GrammarChecks) -> None:
    await checks.check(wanted(regex="a"))
    [process] = checks._idle
    endless = asyncio.create_task(checks.check(wanted(**ENDLESS["parametric rules"])))
    await until_it_works(checks)
    process.kill()
    with pytest.raises(Unavailable, match="try again"):
        await endless
    await checks.check(wanted(regex="b"))
    [idle] = checks._idle
    idle.kill()
    await idle.wait()
    await checks.check(wanted(regex="c"))


async def test_processes_end_when_checks_are_closed(checks: GrammarChecks) -> None:
    await checks.check(wanted(regex="a"))
    [process] = checks._idle
    endless = asyncio.create_task(checks.check(wanted(**ENDLESS["parametric rules"])))
    await until_it_works(checks)
    await checks.close()
    assert process.returncode is not None
    with pytest.raises(asyncio.CancelledError):
        await endless
