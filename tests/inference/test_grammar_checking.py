"""Which grammars are refused, by processes that end with what takes too much."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument, Overloaded, Unavailable, Unsupported
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.grammar import checker, checking
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import definition

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
async def checks(request: pytest.FixtureRequest) -> AsyncIterator[GrammarChecks]:
    max_cpu_s = getattr(request, "param", 1)
    checks = GrammarChecks(resolve_model(DEFAULT_MODEL), vocab_size=VOCAB_SIZE, max_cpu_s=max_cpu_s)
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
    share = await checks.check(large)
    await checks.check(large, num_choices=int(1 / share))
    with pytest.raises(InvalidArgument, match=r"choices together more than that; .* ask for fewer") as refused:
        await checks.check(large, num_choices=int(1 / share) + 1)
    assert refused.value.field == "structured_outputs"


async def test_what_all_outputs_take_together_is_bounded(checks: GrammarChecks) -> None:
    """Each output holds what was compiled for it, and a hundred of the costliest would be all memory there is."""
    costly = wanted(json={"type": "integer", "allOf": [{"multipleOf": prime} for prime in (2, 3, 5, 7, 11, 13)]})
    num_choices = int(1 / await checks.check(costly))
    async with AsyncExitStack() as followed:
        refusals = []
        for _ in range(9):  # each takes more than half of what a request may, and there is room for four
            try:
                await followed.enter_async_context(checks.followed(costly, num_choices=num_choices))
            except Overloaded as error:
                refusals.append(error.message)
        assert "costliest grammar are in use, and at most 4000 may" in refusals[-1]
        async with checks.followed(None):  # any text
            pass
    async with checks.followed(costly, num_choices=num_choices):
        pass


@pytest.mark.skipif(not checker._allocated_bytes(), reason="this C library does not say what is allocated")
def test_memory_is_measured_by_what_is_allocated() -> None:
    began_bytes = checker._allocated_bytes()
    kept = bytearray(2**24)
    assert checker._allocated_bytes() - began_bytes > 2**23
    del kept
    assert checker._allocated_bytes() - began_bytes < 2**23


async def test_tenants_take_turns(checks: GrammarChecks) -> None:
    answered: list[str] = []

    async def check(tenant: str, regex: str) -> None:
        await checks.check(wanted(regex=regex), tenant=tenant)
        answered.append(tenant)

    async with checks._turns.taken("flood"):
        async with checks._turns.taken("flood"):  # no turn is left
            asked = [asyncio.create_task(check("flood", f"a{{{number}}}")) for number in range(1, 6)]
            asked.append(asyncio.create_task(check("other", "b")))
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(checks._turns._line) == len(asked)
        await asyncio.gather(*asked)
    assert answered.index("other") == 1


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
    async with checks._turns.taken(""), checks._turns.taken(""):  # as many as there may be
        with pytest.raises(Overloaded, match="try again later"):
            await checks.check(wanted(regex="a"))


@pytest.mark.parametrize("checks", [600], indirect=True)  # it is killed before it ends by itself
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


async def test_a_process_that_starts_slowly_is_there_for_those_who_come_later(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patience:
        patience.setattr(checking, "_PATIENCE_S", 0.05)
        with pytest.raises(Overloaded):
            await checks.check(wanted(regex="a"))
    assert checks._starting is not None
    await checks._starting
    [process] = checks._idle
    await checks.check(wanted(regex="a"))
    assert checks._idle == [process]


async def test_a_process_that_cannot_start_is_nobodys_fault(checks: GrammarChecks) -> None:
    command, checks._command = checks._command, (sys.executable, "-c", "")
    for _ in range(2):
        with pytest.raises(Unavailable, match="does not start"):
            await checks.check(wanted(regex="a"))
    checks._command = command
    await checks.check(wanted(regex="a"))


async def test_limits_that_the_service_was_started_with_stay(checks: GrammarChecks) -> None:
    limited = 'ulimit -v 60000000 && ulimit -t 600 && ulimit -c 0 && exec "$0" "$@"'
    checks._command = ("sh", "-c", limited, *checks._command)
    await checks.check(wanted(regex="a"))
    with pytest.raises(InvalidArgument, match="make it simpler"):
        await checks.check(wanted(**ENDLESS["parametric rules"]))


@pytest.mark.parametrize(
    ("eos_token_ids", "refusal"),
    [([], "names no end-of-sequence token"), ([2, VOCAB_SIZE], ""), ([VOCAB_SIZE], "names no")],
)
async def test_a_grammar_ends_with_the_ends_that_the_model_can_choose(
    eos_token_ids: list[int], refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = definition.read_definition(resolve_model(DEFAULT_MODEL))
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    path = tmp_path / "cache" / "tokenizers" / f"{definition._digest(folder)}.json"
    definition.keep(path, json.dumps(asdict(replace(known, eos_token_ids=eos_token_ids))))
    checks = GrammarChecks(folder, vocab_size=VOCAB_SIZE)
    try:
        if not refusal:
            await checks.check(wanted(regex="a"))
        for _ in range(2 if refusal else 0):  # also when it is known
            with pytest.raises(Unsupported, match=refusal) as refused:
                await checks.check(wanted(regex="a"))
            assert refused.value.field == "structured_outputs"
    finally:
        await checks.close()


async def test_processes_end_when_checks_are_closed(checks: GrammarChecks) -> None:
    await checks.check(wanted(regex="a"))
    [process] = checks._idle
    endless = asyncio.create_task(checks.check(wanted(**ENDLESS["parametric rules"])))
    await until_it_works(checks)
    await checks.close()
    assert process.returncode is not None
    with pytest.raises(asyncio.CancelledError):
        await endless


async def test_a_process_that_starts_ends_when_checks_are_closed(checks: GrammarChecks) -> None:
    asked = asyncio.create_task(checks.check(wanted(regex="a")))
    for _ in range(20):
        await asyncio.sleep(0)
    starting = checks._starting
    assert starting is not None
    await checks.close()
    assert starting.cancelled()
    assert checks._idle == []
    with pytest.raises(asyncio.CancelledError):
        await asked
