"""B1: one adapter, many requests of mixed lengths at once."""

from benchmarks import goals
from benchmarks.bench import OURS, PEERS, Bench
from benchmarks.cases.common import (
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
from benchmarks.sizes import Size
from benchmarks.stats import gaps, median, percentile
from benchmarks.workload import Request, num_output_tokens

CASE = "B1"
_NUM_VIRTUAL_TOKENS = 20


def expected_turns(size: Size, num_peers: int) -> int:
    """Check, tuning, and each side's turns."""
    return 1 + len(batch_sizes(size, size.num_requests)) + size.num_repeats * (1 + num_peers)


def run(bench: Bench) -> None:
    """Measure and compare."""
    adapters = bench.adapters.make(1, _NUM_VIRTUAL_TOKENS)
    check_exact(bench, CASE, "one adapter", adapters)

    def make(repeat: int) -> list[Request]:
        return requests_for(bench, CASE, repeat, adapters)

    ours = bench.side(OURS)
    ours.load(adapters)
    ours.run(make(WARM_UP))
    entrants = [Entrant(side=OURS)]
    entrants += [warm_up(bench, peer, make(WARM_UP)) for peer in peers_ready(bench, PEERS, adapters)]
    rates = contest(bench, "one adapter", entrants, make)
    note_equal_ids(bench, CASE, "one adapter", entrants)
    requests = make(0)
    floor_s = job_floor_s(requests, bench.shape, bench.limits, num_virtual_tokens=_NUM_VIRTUAL_TOKENS)
    for side, values in rates.items():
        share = median(values) * floor_s / num_output_tokens(requests)
        measured(bench, CASE, side, values, floor_share=share)
    for percent in (50, 99):
        latencies = [1e3 * percentile(gaps(one.token_times_s), percent) for one in entrants[0].outcomes]
        measured(bench, CASE, OURS, latencies, metric=f"inter-token latency p{percent}", unit="ms")
    ours_share = median(rates[OURS]) * floor_s / num_output_tokens(requests)
    for peer in PEERS:
        what = f"1 adapter, {len(requests)} requests"
        ratio_row(bench, CASE, what, peer, rates, goals.ONE_ADAPTER[peer], floor_share=ours_share)
