"""B8: a hundred thousand registered soft prompts, and traffic over ten thousand of them, by Zipf's law.

One system as a user starts it, with room on the device for all that have traffic. What is counted as a hit: a
request whose adapter was on the device when it came.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import accumulate
from random import Random

from grpc_health.v1.health_pb2 import HealthCheckRequest
from softprompt.cli import bound
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from softprompt_api.rpc.channel import open_blocking_channel
from softprompt_api.rpc.probe import check_of

from benchmarks import goals
from benchmarks.bench import OURS, Bench
from benchmarks.cases.common import SEED, measured
from benchmarks.exposition import counted, exposition, percentile_bound
from benchmarks.fresh import FreshAdapter, FreshAdapters, register_all
from benchmarks.goals import Goal
from benchmarks.http_load import stream_each, stream_one
from benchmarks.ports import free_ports
from benchmarks.results import Check, Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import Size
from benchmarks.stats import equal_share, median, percentile
from benchmarks.system import System
from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens

CASE = "B8"
_VIRTUAL_TOKENS = 20
# Of those without traffic: what they cost is their number, and a hundred thousand of 20 would fill small machines.
_IDLE_VIRTUAL_TOKENS = 4
_UPLOADS_AT_ONCE = 32
_PAGE_SIZE = 1000
_WARM_UP_AT_ONCE = 64
_WARM_UP_REQUESTS = 500
_CHECKED = 4
_SYNC_TIMEOUT_S = 300.0
_POLL_S = 0.02
_MEBI = 2**20


def expected_turns(size: Size, num_peers: int) -> int:  # noqa: ARG001 - no peer has a registry
    """Registering, looking up, listing, the gateway's list, warming up, and each turn of traffic."""
    return 5 + 2 * size.num_repeats


def run(bench: Bench) -> None:
    """Measure and compare."""
    bench.close_all()  # sides that only wait hold memory, which a hundred thousand adapters may need
    size = bench.size
    names = [f"soft-{number:06}" for number in range(size.registered)]
    # Popular ones lie anywhere in the list.
    asked = names[:: size.registered // size.asked][: size.asked]
    Random(SEED).shuffle(asked)
    threads = {} if bench.num_threads is None else {"SOFTPROMPT_NUM_THREADS": str(bench.num_threads)}
    env = bench.environment(**threads, SOFTPROMPT_MAX_ADAPTER_ROWS=str(max(size.asked * _VIRTUAL_TOKENS, 512)))
    with System(
        model=bench.model,
        adapters={},
        folder=bench.folder / "b8",
        env=env,
        flags=["--max-prompt-adapters", str(size.asked)],
    ) as system:
        system.wait_until_ready()
        memory = {"at the start": system.memory_bytes()}
        _register(bench, system, names, set(asked))
        memory["all registered"] = system.memory_bytes()
        _resolve(bench, system, names)
        _list(bench, system)
        _gateways_list(bench, system)
        before = _ask(system, bench, asked[:_CHECKED])
        _warm_up(bench, system, asked)
        memory["all asked for"] = system.memory_bytes()
        _traffic(bench, system, asked)
        memory["after the traffic"] = system.memory_bytes()
        share = equal_share(before, _ask(system, bench, asked[:_CHECKED]))
        what = "same answers before and after the traffic"
        bench.results.checks.append(Check(case=CASE, what=what, share=share, is_required=False))
    _memory_rows(bench, memory)


def _row(
    bench: Bench,
    what: str,
    unit: str,
    value: float,
    goal: Goal = goals.NONE,
    *,
    note: str = "",
    at_most: bool = True,
) -> None:
    bench.results.rows.append(
        Row(
            case=CASE, what=what, unit=unit, ours=value, compared=value, must=goal.must, at_most=at_most, note=note
        )
    )


def _register(bench: Bench, system: System, names: list[str], asked: set[str]) -> None:
    fresh = FreshAdapters(bench.model, bench.shape.vocab_size)

    def make() -> Iterator[tuple[str, FreshAdapter]]:
        for number, name in enumerate(names):
            yield name, fresh.soft_prompt(number, _VIRTUAL_TOKENS if name in asked else _IDLE_VIRTUAL_TOKENS)

    seconds = register_all(system.registry, make(), at_once=_UPLOADS_AT_ONCE)
    rate = len(names) / seconds
    measured(bench, CASE, OURS, [rate], metric="registrations", unit="1/s")
    bench.progress.turn(f"{len(names):,} registered in {seconds:.1f} s: {rate:.0f} per second")
    note = f"{_UPLOADS_AT_ONCE} at a time, making them included; each was on the disk before it was acknowledged"
    _row(bench, f"{len(names):,} registrations", "1/s", rate, note=note)


def _resolve(bench: Bench, system: System, names: list[str]) -> None:
    """Milliseconds from a name, then from a digest, to the version, one after the other.

    In turn with calls that ask for nothing: what they take, no answer can do without.
    """
    chosen = Random(SEED).choices(names, k=bench.size.resolves)
    empty: list[float] = []
    with open_blocking_channel(system.registry) as channel:
        get, check = RegistryServiceStub(channel).GetAdapter, check_of(channel)
        found = [get(pb.GetAdapterRequest(adapter=name)).adapter for name in chosen[:_CHECKED]]  # connects
        if [version.name for version in found] != chosen[:_CHECKED]:
            raise SideFailed("a name stands for another adapter")
        for kind in ("name", "digest"):
            spellings, values = [], []
            for place, spelling in enumerate(chosen):
                start = time.perf_counter()
                check(HealthCheckRequest())
                asked = time.perf_counter()
                version = get(pb.GetAdapterRequest(adapter=spelling)).adapter
                empty.append(1e3 * (asked - start))
                values.append(1e3 * (time.perf_counter() - asked))
                spellings.append(version.digest)
                assert kind == "name" or version.digest == chosen[place]
            measured(bench, CASE, OURS, values, metric=f"resolve a {kind}", unit="ms")
            p50, p99 = median(values), percentile(values, 99)
            bench.progress.say(f"a {kind} is resolved in {p50:.2f} ms (p50), {p99:.2f} ms (p99)")
            _row(bench, f"{kind} to version, p99", "ms", p99, goals.RESOLVE_MS, note=f"p50 {p50:.2f} ms")
            chosen = spellings
    measured(bench, CASE, OURS, empty, metric="a call that asks for nothing", unit="ms")
    note = f"of gRPC's health service, beside these; p50 {median(empty):.2f} ms"
    _row(bench, "a call that asks for nothing, p99", "ms", percentile(empty, 99), note=note)
    bench.progress.turn("names and digests looked up")


def _list(bench: Bench, system: System) -> None:
    """Milliseconds of each page of the list of everything."""
    values, num_listed, token = [], 0, ""
    with open_blocking_channel(system.registry) as channel:
        stub = RegistryServiceStub(channel)
        while True:
            request = pb.ListAdaptersRequest(page_size=_PAGE_SIZE, page_token=token)
            start = time.perf_counter()
            page = stub.ListAdapters(request)
            values.append(1e3 * (time.perf_counter() - start))
            num_listed += len(page.adapters)
            token = page.next_page_token
            if not token:
                break
    if num_listed != bench.size.registered:
        raise SideFailed(f"the registry lists {num_listed} of {bench.size.registered} adapters")
    measured(bench, CASE, OURS, values, metric=f"page of {_PAGE_SIZE}", unit="ms")
    bench.progress.turn(
        f"{len(values)} pages of the list: {median(values):.0f} ms (p50), {max(values):.0f} at most"
    )
    note = f"first page {values[0]:.0f} ms, slowest of {len(values)} {max(values):.0f} ms"
    _row(bench, f"page of {_PAGE_SIZE} adapters (p50)", "ms", median(values), note=note)


def _gateways_list(bench: Bench, system: System) -> None:
    """Seconds until one more gateway knows all adapters, and those of one GET /v1/models."""
    [port] = free_ports(1)
    env = bench.environment(
        SOFTPROMPT_REGISTRY_ADDRESS=system.registry,
        SOFTPROMPT_INFERENCE_ADDRESS=system.inference,
        SOFTPROMPT_GATEWAY_PORT=str(port),
    )
    start = time.perf_counter()
    with (bench.folder / "b8-gateway").open("wb") as output:
        gateway = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", bound.__file__, str(os.getpid())),
                *(sys.executable, "-P", "-m", "softprompt_gateway"),
            ],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        seconds = _until_known(port, bench.size.registered, start)
    finally:
        gateway.terminate()
        gateway.wait()
    _row(bench, "a gateway's start, until it knows all", "s", seconds)
    _until_known(system.port, bench.size.registered, time.perf_counter())
    start = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{system.port}/v1/models") as response:
        size_bytes = len(response.read())
    listing = time.perf_counter() - start
    _row(bench, "GET /v1/models, all of it", "s", listing, note=f"{size_bytes / 1e6:.1f} MB")
    bench.progress.turn(f"a new gateway knows all after {seconds:.1f} s; /v1/models takes {listing:.1f} s")


def _until_known(port: int, count: int, start: float) -> float:
    deadline = start + _SYNC_TIMEOUT_S
    while time.perf_counter() < deadline:
        try:
            known = counted(exposition(port), "softprompt_gateway_known_adapters")
        except OSError:  # it does not listen yet
            known = 0.0
        if known == count:
            return time.perf_counter() - start
        time.sleep(_POLL_S)
    raise SideFailed(f"the gateway does not know all {count} adapters after {_SYNC_TIMEOUT_S:.0f} s")


def _ask(system: System, bench: Bench, names: list[str]) -> list[list[int]]:
    """The ids that each of these answers with, alone."""
    requests = make_requests(
        f"{CASE}, same answers",
        seed=SEED,
        repeat=0,
        count=len(names),
        prompts=bench.size.prompts,
        outputs=Lengths(shortest=bench.size.check_tokens, longest=bench.size.check_tokens),
        vocab_size=bench.shape.vocab_size,
    )
    return [
        stream_one(system.port, name, request).token_ids for name, request in zip(names, requests, strict=True)
    ]


def _warm_up(bench: Bench, system: System, asked: list[str]) -> None:
    """Use each once, the rarest first: what is then in the prefix cache is about what traffic leaves there."""
    requests = make_requests(
        CASE,
        seed=SEED,
        repeat=-1,
        count=len(asked),
        prompts=Lengths(shortest=2, longest=2),
        outputs=Lengths(shortest=1, longest=1),
        vocab_size=bench.shape.vocab_size,
    )
    named = list(zip(reversed(asked), requests, strict=True))
    start = time.perf_counter()
    for first in range(0, len(named), _WARM_UP_REQUESTS):
        stream_each(system.port, named[first : first + _WARM_UP_REQUESTS], at_once=_WARM_UP_AT_ONCE)
    seconds = time.perf_counter() - start
    bench.progress.turn(f"each of {len(asked):,} asked for once in {seconds:.1f} s")


def _traffic(bench: Bench, system: System, asked: list[str]) -> None:
    """Tokens per second of one adapter, and of many by Zipf's law, in turn; and where the latter were found."""
    size = bench.size
    weights = list(accumulate(1 / rank for rank in range(1, len(asked) + 1)))
    random = Random(SEED)
    rates: dict[str, list[float]] = {"one": [], "many": []}
    found = dict.fromkeys(("device", "host", "registry"), 0.0)
    used: set[str] = set()
    told = exposition(system.port)
    # One turn that is not counted, so that the one adapter is as warm as the others.
    _rate(bench, system, [(asked[0], request) for request in _requests(bench, 2 * size.num_repeats)])
    for repeat in range(size.num_repeats):
        one = [(asked[0], request) for request in _requests(bench, 2 * repeat)]
        rates["one"].append(_rate(bench, system, one))
        bench.progress.turn(f"one adapter: {rates['one'][-1]:.0f} tokens/s")
        names = random.choices(asked, cum_weights=weights, k=size.asked_requests)
        used.update(names)
        before = _hits(system)
        many = list(zip(names, _requests(bench, 2 * repeat + 1), strict=True))
        rates["many"].append(_rate(bench, system, many))
        for tier, count in _hits(system).items():
            found[tier] += count - before[tier]
        bench.progress.turn(f"{len(set(names))} of {len(asked):,}, by Zipf: {rates['many'][-1]:.0f} tokens/s")
    for kind, values in rates.items():
        measured(bench, CASE, f"{OURS}, {kind}", values)
    one_rate, many_rate = median(rates["one"]), median(rates["many"])
    goal = goals.MANY_REGISTERED_OVER_ONE
    bench.results.rows.append(
        Row(
            case=CASE,
            what=f"Zipf over {len(asked):,} of {size.registered:,}",
            unit="tokens/s",
            ours=many_rate,
            peer="ours, one adapter",
            peer_value=one_rate,
            compared=many_rate / one_rate,
            must=goal.must,
            note=f"each used once before; {len(used)} of them in the timed requests",
        )
    )
    p99_ms = 1e3 * percentile_bound(exposition(system.port), told, "softprompt_gateway_resolve_seconds", 99)
    note = "as the gateway counts it; the bound of the bucket that it lies in"
    _row(bench, "a request's adapter to its version, p99", "ms", p99_ms, goals.RESOLVE_MS, note=note)
    total = sum(found.values())
    where = ", ".join(f"{count / total:.1%} {tier}" for tier, count in found.items())
    _row(
        bench,
        "requests that find their adapter on the device",
        "",
        found["device"] / total,
        goals.RESIDENT_HITS,
        note=f"{where}; with --max-prompt-adapters {len(asked)}",
        at_most=False,
    )


def _requests(bench: Bench, repeat: int) -> list[Request]:
    size = bench.size
    return make_requests(
        CASE,
        seed=SEED,
        repeat=repeat,
        count=size.asked_requests,
        prompts=size.prompts,
        outputs=size.outputs,
        vocab_size=bench.shape.vocab_size,
    )


def _rate(bench: Bench, system: System, named: list[tuple[str, Request]]) -> float:
    start = time.perf_counter()
    streams = stream_each(system.port, named, at_once=bench.size.streams)
    seconds = time.perf_counter() - start
    requests = [request for _, request in named]
    if [stream.num_tokens for stream in streams] != [request.num_tokens for request in requests]:
        raise SideFailed("over HTTP other numbers of tokens came than were asked for")
    return num_output_tokens(requests) / seconds


def _hits(system: System) -> dict[str, float]:
    text = exposition(system.port)
    return {
        tier: counted(text, "softprompt_inference_adapter_hits_total", tier=tier)
        for tier in ("device", "host", "registry")
    }


def _memory_rows(bench: Bench, memory: dict[str, dict[str, int]]) -> None:
    for when, by_service in memory.items():
        text = ", ".join(f"{name} {size_bytes / _MEBI:,.0f} MB" for name, size_bytes in by_service.items())
        bench.progress.say(f"memory, {when}: {text}")
    start = memory["at the start"]
    for name in start:
        by_time = [by_service.get(name, 0) / _MEBI for by_service in memory.values()]
        measured(bench, CASE, name, by_time, metric="memory: " + ", ".join(memory), unit="MB")
        _row(bench, f"memory of the {name}", "MB", max(by_time), note=f"at the start {by_time[0]:,.0f} MB")
