"""B6: adapters that nobody has used before: how long their first request waits, and what others notice of it.

Over HTTP, on a running system. A soft prompt's first request is compared with one of the base model whose prompt
is longer by as many tokens: all that is left is fetching, checking and loading.
"""

import base64
import hashlib
import http.client
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from softprompt.inference import InferenceClient

from benchmarks import goals
from benchmarks.bench import Bench
from benchmarks.cases.common import SEED, measured
from benchmarks.fresh import FreshAdapter, FreshAdapters, register_all
from benchmarks.goals import Goal
from benchmarks.http_load import stream_one, stream_tokens
from benchmarks.results import Check, Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import Size
from benchmarks.stats import equal_share, gaps, median, percentile
from benchmarks.system import System
from benchmarks.workload import Lengths, Request, make_requests

CASE = "B6"
_BASE = "base"
_PROMPT_TOKENS = 32
_VIRTUAL_TOKENS = (20, 100)
_RANK = 16
_MAX_STREAMS = 8
# Of streaming, in each repeat: one has 125 gaps between steps, of which p99 is the second longest.
_ROUNDS = 3
# Loads while others stream: how long each waits behind the one before.
_PAUSES_S = {"soft prompts": 0.1, "LoRAs": 0.4}
_UPLOAD_TIMEOUT_S = 60.0
_NUMBERS = itertools.count()


@dataclass(slots=True, kw_only=True)
class _Taken:
    """Milliseconds, one value per adapter.

    Attributes:
        base: of the base model, its prompt longer by the virtual tokens.
        register: registering, over HTTP.
        cold, warm: to the first token of its first request, and of another.
        same: the share of ids that a repetition of its first request gave again.
    """

    base: list[float] = field(default_factory=list)
    register: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


def expected_turns(size: Size, num_peers: int) -> int:  # noqa: ARG001 - no peer is asked
    """Each kind's first tokens, and each phase of streaming."""
    return len(_VIRTUAL_TOKENS) + 1 + _ROUNDS * size.num_repeats * (1 + len(_PAUSES_S))


def run(bench: Bench) -> None:
    """Measure and compare."""
    fresh = FreshAdapters(bench.model, bench.shape.vocab_size)
    threads = {} if bench.num_threads is None else {"SOFTPROMPT_NUM_THREADS": str(bench.num_threads)}
    with System(
        model=bench.model, adapters={}, folder=bench.folder / "b6", env=bench.environment(**threads)
    ) as system:
        system.wait_until_ready()
        for num_virtual_tokens in _VIRTUAL_TOKENS:
            adapters = [
                fresh.soft_prompt(number, num_virtual_tokens) for number in range(bench.size.cold_starts + 1)
            ]
            what = f"{num_virtual_tokens} virtual tokens"
            taken = _first_tokens(bench, system, what, adapters, num_virtual_tokens)
            _soft_prompt_rows(bench, what, taken)
        loras = [fresh.lora(number, _RANK) for number in range(bench.size.cold_starts + 1)]
        what = f"LoRA of {len(loras[0].tensors) / 1e6:.0f} MB"
        _lora_rows(bench, what, _first_tokens(bench, system, what, loras, 0))
        _while_others_stream(bench, system, fresh)


def _request(bench: Bench, number: int, num_tokens: int, *, output: int = 1) -> Request:
    [request] = make_requests(
        CASE,
        seed=SEED,
        repeat=number,
        count=1,
        prompts=Lengths(shortest=num_tokens, longest=num_tokens),
        outputs=Lengths(shortest=output, longest=output),
        vocab_size=bench.shape.vocab_size,
    )
    return request


def _first_tokens(
    bench: Bench, system: System, what: str, adapters: list[FreshAdapter], num_virtual_tokens: int
) -> _Taken:
    """Base model, new adapter, the same adapter again, in turn; the first round of these warms up."""
    taken = _Taken()
    kind = what.replace(" ", "-").replace(".", "-").lower()
    for number, adapter in enumerate(adapters):
        name = f"cold-{kind}-{number}"
        # No text begins as another has begun, of whatever kind: nothing but the adapter is found in the cache.
        longer, prompt, other = (
            _request(bench, next(_NUMBERS), _PROMPT_TOKENS + more) for more in (num_virtual_tokens, 0, 0)
        )
        base = _time_first_token(system, _BASE, longer)
        registering = _register(system, name, adapter)
        cold = _time_first_token(system, name, prompt)
        warm = _time_first_token(system, name, other)
        again = stream_one(system.port, name, prompt).token_ids
        if number:
            taken.base.append(base[0])
            taken.register.append(registering)
            taken.cold.append(cold[0])
            taken.warm.append(warm[0])
            taken.same.append(equal_share([cold[1]], [again]))
    bench.results.checks.append(
        Check(
            case=CASE,
            what=f"{what}, first against later",
            share=sum(taken.same) / len(taken.same),
            is_required=False,
        )
    )
    for side, values in (
        ("base model, prompt longer by the virtual tokens", taken.base),
        ("registering", taken.register),
        ("first request", taken.cold),
        ("later request", taken.warm),
    ):
        measured(bench, CASE, f"{what}: {side}", values, metric="time", unit="ms")
    bench.progress.turn(
        f"{what}: base model {median(taken.base):.1f} ms, registering {median(taken.register):.1f} ms, first "
        f"token of its first request {median(taken.cold):.1f} ms, of a later one {median(taken.warm):.1f} ms"
    )
    return taken


def _time_first_token(system: System, model: str, request: Request) -> tuple[float, list[int]]:
    """Milliseconds, and the ids."""
    stream = stream_one(system.port, model, request)
    return 1e3 * (stream.first_token_at - stream.began_at), stream.token_ids


def _register(system: System, name: str, adapter: FreshAdapter) -> float:
    """Milliseconds to register an adapter as a user does."""
    headers = {
        "content-type": "application/octet-stream",
        "x-adapter-config": base64.b64encode(adapter.config_json.encode()).decode(),
        "x-adapter-sha256": hashlib.sha256(adapter.tensors).hexdigest(),
    }
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=_UPLOAD_TIMEOUT_S)
    try:
        connection.request("POST", f"/v1/adapters/{name}", adapter.tensors, headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != http.client.CREATED:
        raise SideFailed(f"{name} was not registered: {body[:300]!r}")
    return 1e3 * (time.monotonic() - start)


def _soft_prompt_rows(bench: Bench, what: str, taken: _Taken) -> None:
    added = median([cold - base for cold, base in zip(taken.cold, taken.base, strict=True)])
    _row(
        bench,
        f"{what}: first request, added",
        median(taken.cold),
        "as many text tokens",
        median(taken.base),
        added,
        goals.COLD_SOFT_PROMPT_MS,
    )
    _registered_row(bench, what, taken)


def _lora_rows(bench: Bench, what: str, taken: _Taken) -> None:
    cold = median(taken.cold)
    _row(bench, f"{what}: first request", cold, "a later one", median(taken.warm), cold, goals.COLD_LORA_MS)
    _registered_row(bench, what, taken)


def _registered_row(bench: Bench, what: str, taken: _Taken) -> None:
    total = median([register + cold for register, cold in zip(taken.register, taken.cold, strict=True)])
    _row(bench, f"{what}: registering to first token", total, "", None, total, goals.NONE)


def _row(
    bench: Bench,
    what: str,
    ours: float,
    peer: str,
    peer_value: float | None,
    compared: float,
    goal: Goal,
    note: str = "",
) -> None:
    bench.results.rows.append(
        Row(
            case=CASE,
            what=what,
            unit="ms",
            ours=ours,
            peer=peer,
            peer_value=peer_value,
            compared=compared,
            must=goal.must,
            at_most=True,
            note=note,
        )
    )


def _while_others_stream(bench: Bench, system: System, fresh: FreshAdapters) -> None:
    """Gaps between tokens of running streams: nothing loaded, soft prompts loaded, LoRAs loaded, in turn."""
    names = _register_for_loading(bench, system, fresh)
    _gaps_ms(bench, system)  # warms up, and what was registered is probed meanwhile
    seen: dict[str, list[float]] = {"nothing": [], **{kind: [] for kind in _PAUSES_S}}
    counts = dict.fromkeys(seen, 0)
    for number in range(_ROUNDS * bench.size.num_repeats):
        for kind, values in seen.items():
            with _loading(
                system, names[kind][number] if kind in names else [], _PAUSES_S.get(kind, 0.0)
            ) as loaded:
                values += _gaps_ms(bench, system)
            counts[kind] += len(loaded)
            p50, p99 = median(values), percentile(values, 99)
            bench.progress.turn(f"{len(loaded)} {kind} loaded: gaps {p50:.1f} ms (p50), {p99:.1f} ms (p99)")
    for kind, values in seen.items():
        measured(bench, CASE, f"loading {kind}", values, metric="gap between tokens", unit="ms")
    quiet = percentile(seen["nothing"], 99)
    for kind in _PAUSES_S:
        p99 = percentile(seen[kind], 99)
        _row(
            bench,
            f"gaps of running streams (p99), {kind} being loaded",
            p99,
            "nothing loaded",
            quiet,
            p99 / quiet,
            goals.GAPS_WHILE_LOADING,
            note=f"{counts[kind]} were loaded, each {1e3 * _PAUSES_S[kind]:.0f} ms behind the one before",
        )


def _register_for_loading(bench: Bench, system: System, fresh: FreshAdapters) -> dict[str, list[list[str]]]:
    """Names of adapters that nobody uses, for each kind and round."""
    size = bench.size
    makers: dict[str, Callable[[int], FreshAdapter]] = {
        "soft prompts": lambda number: fresh.soft_prompt(1000 + number, _VIRTUAL_TOKENS[0]),
        "LoRAs": lambda number: fresh.lora(1000 + number, _RANK),
    }
    counts = {"soft prompts": size.loads, "LoRAs": max(1, size.loads // 3)}
    names: dict[str, list[list[str]]] = {}
    for kind, make in makers.items():
        count = counts[kind] * _ROUNDS * size.num_repeats
        all_names = [f"load-{kind.lower().replace(' ', '-')}-{number}" for number in range(count)]
        register_all(system.registry, ((name, make(number)) for number, name in enumerate(all_names)), at_once=2)
        names[kind] = [all_names[start : start + counts[kind]] for start in range(0, count, counts[kind])]
    return names


@contextmanager
def _loading(system: System, names: list[str], pause_s: float) -> Iterator[list[str]]:
    """Bring adapters in, one after the other, while the context lasts; yields those that were."""
    loaded: list[str] = []
    failures: list[Exception] = []
    end = threading.Event()

    def load() -> None:
        try:
            with InferenceClient(system.inference) as client:
                for name in names:
                    if end.wait(pause_s):
                        return
                    client.preload(name)
                    loaded.append(name)
        except Exception as error:  # told below, in the thread that measures
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        yield loaded
    finally:
        end.set()
        thread.join()
    if failures:
        raise SideFailed(f"an adapter was not loaded: {failures[0]}")


def _gaps_ms(bench: Bench, system: System) -> list[float]:
    size = bench.size
    requests = make_requests(
        f"{CASE}, gaps",
        seed=SEED,
        repeat=next(_NUMBERS),
        count=min(size.streams, _MAX_STREAMS),
        prompts=Lengths(shortest=_PROMPT_TOKENS, longest=_PROMPT_TOKENS),
        outputs=Lengths(shortest=size.outputs.longest, longest=size.outputs.longest),
        vocab_size=bench.shape.vocab_size,
    )
    # Up to the first tokens, prompts are computed between the tokens of those that came before.
    return [1e3 * gap for gap in gaps([times[2:] for times in stream_tokens(system.port, _BASE, requests)])]
