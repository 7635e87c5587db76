"""B7: what HTTP costs: /v1 streaming through gateway and inference service, against the engine alone.

Twice: with the real model, which shares the processors with the servers, and with an engine whose steps take a
fixed time, which shows the servers' own cost.
"""

import time
from dataclasses import dataclass, field

from benchmarks import goals
from benchmarks.bench import OURS, STUB, Bench
from benchmarks.cases.common import SEED, WARM_UP, measured
from benchmarks.goals import Goal
from benchmarks.http_load import stream_all, stream_one
from benchmarks.results import Check, Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import Size
from benchmarks.stats import equal_share, median
from benchmarks.stub.engine import STEP_S
from benchmarks.stub.run import INFERENCE
from benchmarks.system import System
from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens

CASE = "B7"
HTTP = "ours, over HTTP"
_NUM_VIRTUAL_TOKENS = 20
_ADAPTER = "bench"
_GATEWAY = "softprompt_gateway"


@dataclass(slots=True, kw_only=True)
class _Taken:
    """One value per repeat; CPU microseconds are per token, of gateway and front."""

    http_rates: list[float] = field(default_factory=list)
    engine_rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def expected_turns(size: Size, num_peers: int) -> int:  # noqa: ARG001 - no peer has a gateway of ours
    """Throughput with model and stub, and first tokens."""
    return 4 * size.num_repeats + 1


def run(bench: Bench) -> None:
    """Measure and compare."""
    [adapter] = bench.adapters.make(1, _NUM_VIRTUAL_TOKENS)
    _with_model(bench, adapter)
    _with_stub(bench)


def _requests(bench: Bench, repeat: int, adapter: str | None) -> list[Request]:
    size = bench.size
    return make_requests(
        CASE,
        seed=SEED,
        repeat=repeat,
        count=size.streams,
        prompts=size.prompts,
        outputs=Lengths(shortest=size.outputs.longest, longest=size.outputs.longest),
        vocab_size=bench.shape.vocab_size,
        adapters=(adapter,),
    )


def _with_model(bench: Bench, adapter: str) -> None:
    engine = bench.side(OURS)
    engine.load([adapter])
    warm_up = _requests(bench, WARM_UP, adapter)
    expected = engine.run(warm_up).token_ids
    threads = {} if bench.num_threads is None else {"SOFTPROMPT_NUM_THREADS": str(bench.num_threads)}
    taken = _Taken()
    folder = bench.folder / "b7-model"
    env = bench.environment(**threads)
    with System(model=bench.model, adapters={_ADAPTER: adapter}, folder=folder, env=env) as system:
        system.wait_until_ready()
        streams = stream_all(system.port, _ADAPTER, warm_up, with_ids=True)
        share = equal_share(expected, [stream.token_ids for stream in streams])
        what = f"over HTTP, {bench.dtype}, engine alone"
        bench.results.checks.append(Check(case=CASE, what=what, share=share, is_required=False))
        for repeat in range(bench.size.num_repeats):
            requests = _requests(bench, repeat, adapter)
            _stream_turn(bench, system, "softprompt_inference", requests, taken, "model", _ADAPTER)
            seconds = engine.run(requests).seconds
            taken.engine_rates.append(num_output_tokens(requests) / seconds)
            bench.progress.turn(f"model, engine alone: {taken.engine_rates[-1]:.0f} tokens/s")
        _first_tokens(bench, system, adapter)
    _rows(bench, "with the model", taken, goals.GATEWAY_THROUGHPUT)


def _with_stub(bench: Bench) -> None:
    engine = bench.side(STUB)
    engine.run(_requests(bench, WARM_UP, None))
    taken = _Taken()
    with System(
        model=bench.model,
        adapters={},
        folder=bench.folder / "b7-stub",
        env=bench.environment(),
        module="benchmarks.stub.run",
    ) as system:
        system.wait_until_ready()
        stream_all(system.port, "base", _requests(bench, WARM_UP, None))
        for repeat in range(bench.size.num_repeats):
            requests = _requests(bench, repeat, None)
            _stream_turn(bench, system, INFERENCE, requests, taken, "stub", "base")
            taken.engine_rates.append(num_output_tokens(requests) / engine.run(requests).seconds)
            bench.progress.turn(f"stub, engine alone: {taken.engine_rates[-1]:.0f} tokens/s")
    _rows(bench, f"with steps of {1e3 * STEP_S:.0f} ms", taken, goals.GATEWAY_THROUGHPUT)


def _stream_turn(
    bench: Bench,
    system: System,
    inference: str,
    requests: list[Request],
    taken: _Taken,
    label: str,
    model: str,
) -> None:
    modules = [_GATEWAY, inference]
    cpu_s = system.cpu_s(modules)
    start = time.perf_counter()
    streams = stream_all(system.port, model, requests)
    seconds = time.perf_counter() - start
    cpu_s = system.cpu_s(modules) - cpu_s
    num_tokens = num_output_tokens(requests)
    if [stream.num_tokens for stream in streams] != [request.num_tokens for request in requests]:
        raise SideFailed("over HTTP other numbers of tokens came than were asked for")
    taken.http_rates.append(num_tokens / seconds)
    taken.cpu_us.append(1e6 * cpu_s / num_tokens)
    bench.progress.turn(
        f"{label}, {len(requests)} streams over HTTP: {taken.http_rates[-1]:.0f} tokens/s, "
        f"{taken.cpu_us[-1]:.0f} µs of CPU per token in gateway and front"
    )


def _first_tokens(bench: Bench, system: System, adapter: str) -> None:
    """Milliseconds to the first token of requests that come alone, over HTTP and from the engine in turn."""
    size = bench.size
    requests = make_requests(
        f"{CASE}, first token",
        seed=SEED,
        repeat=0,
        count=size.single_requests,
        prompts=size.prompts,
        outputs=Lengths(shortest=1, longest=1),
        vocab_size=bench.shape.vocab_size,
        adapters=(adapter,),
    )
    over_http, alone = [], []
    for request in requests:
        stream = stream_one(system.port, _ADAPTER, request)
        over_http.append(1e3 * (stream.first_token_at - stream.began_at))
        alone.append(1e3 * bench.side(OURS).run([request]).seconds)
    metric = "time to first token"
    measured(bench, CASE, HTTP, over_http, metric=metric, unit="ms")
    measured(bench, CASE, OURS, alone, metric=metric, unit="ms")
    added = median(over_http) - median(alone)
    bench.progress.turn(
        f"first token over HTTP {median(over_http):.1f} ms, from the engine {median(alone):.1f} ms"
    )
    goal = goals.GATEWAY_FIRST_TOKEN_MS
    bench.results.rows.append(
        Row(
            case=CASE,
            what="time to first token, added (p50)",
            unit="ms",
            ours=median(over_http),
            peer="engine alone",
            peer_value=median(alone),
            compared=added,
            must=goal.must,
            at_most=True,
        )
    )


def _rows(bench: Bench, what: str, taken: _Taken, goal: Goal) -> None:
    measured(bench, CASE, f"{HTTP}, {what}", taken.http_rates)
    measured(bench, CASE, f"{OURS}, {what}", taken.engine_rates)
    measured(bench, CASE, f"{HTTP}, {what}", taken.cpu_us, metric="CPU of gateway and front", unit="µs/token")
    http_rate, engine_rate, cpu_us = map(median, (taken.http_rates, taken.engine_rates, taken.cpu_us))
    bench.results.rows += [
        Row(
            case=CASE,
            what=f"streaming {what}",
            unit="tokens/s",
            ours=http_rate,
            peer="engine alone",
            peer_value=engine_rate,
            compared=http_rate / engine_rate,
            must=goal.must,
        ),
        Row(
            case=CASE,
            what=f"CPU per token {what}",
            unit="µs",
            ours=cpu_us,
            compared=cpu_us,
            must=goals.GATEWAY_CPU_US.must,
            at_most=True,
        ),
    ]
