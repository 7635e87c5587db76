"""Checking, tuning and timing, as most cases need them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.bench import ORACLE, OURS, Bench, CheckFailed
from benchmarks.goals import Goal
from benchmarks.results import Check, Measurement, Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import Size
from benchmarks.stats import equal_share, median
from benchmarks.workload import Outcome, Request, make_requests, num_output_tokens, without_adapters

SEED = 1
# Repeats that are not timed, with ids of their own.
WARM_UP = -1
CHECK = -2
BASE_ONLY = "transformers-cb"
_WARM_UP_REQUESTS = 16


@dataclass(slots=True, kw_only=True)
class Entrant:
    """A side in a contest.

    Attributes:
        options: of its runs.
        outcomes: of its timed turns.
    """

    side: str
    options: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def requests(self, requests: list[Request]) -> list[Request]:
        """What it is given: without adapters where it can take none."""
        return without_adapters(requests) if self.side == BASE_ONLY else requests


def requests_for(
    bench: Bench, what: str, repeat: int, adapters: Sequence[str | None], *, count: int | None = None
) -> list[Request]:
    """This size's requests for a repeat of a measurement, the adapters in rotation."""
    return make_requests(
        what,
        seed=SEED,
        repeat=repeat,
        count=bench.size.num_requests if count is None else count,
        prompts=bench.size.prompts,
        outputs=bench.size.outputs,
        vocab_size=bench.shape.vocab_size,
        adapters=adapters,
    )


def check_exact(bench: Bench, case: str, what: str, adapters: Sequence[str | None]) -> None:
    """In float32, ours in one batch must give the ids of PEFT at batch size 1. CheckFailed where it does not.

    Needs PEFT whether or not it is timed.
    """
    size = bench.size
    requests = [
        replace(request, num_tokens=size.check_tokens)
        for request in requests_for(bench, f"{case}, {what}", CHECK, adapters, count=size.check_requests)
    ]
    used = [request.adapter for request in requests if request.adapter is not None]
    outputs = {}
    for side in (OURS, "peft"):
        running = bench.side(side, ORACLE)
        running.load(used)
        outputs[side] = running.run(requests, batch_size=1).token_ids
        if bench.device != "cpu":
            # Two models in float32 may be more than a GPU holds.
            bench.close(side, ORACLE)
    share = equal_share(outputs[OURS], outputs["peft"])
    bench.results.checks.append(Check(case=case, what=f"{what}, float32, PEFT", share=share, is_required=True))
    bench.progress.turn(f"{what}: {share:.2%} of ids equal PEFT's in float32 ({len(requests)} prompts)")
    if share < 1:
        raise CheckFailed(f"{what}: only {share:.2%} of our ids equal PEFT's in float32")


def warm_up(bench: Bench, peer: str, requests: list[Request]) -> Entrant:
    """A peer that has seen requests of this kind; PEFT with its fastest batch size for them."""
    options = {"batch_size": best_batch_size(bench, requests)} if peer == "peft" else {}
    entrant = Entrant(side=peer, options=options)
    if peer != "peft":
        bench.side(peer).run(entrant.requests(requests)[:_WARM_UP_REQUESTS])
    return entrant


def best_batch_size(bench: Bench, requests: list[Request]) -> int:
    """PEFT's fastest batch size for these requests."""
    side = bench.side("peft")
    seconds = {}
    for batch_size in batch_sizes(bench.size, len(requests)):
        seconds[batch_size] = side.run(requests, batch_size=batch_size).seconds
        rate = num_output_tokens(requests) / seconds[batch_size]
        bench.progress.turn(f"peft, padded batches of {batch_size}: {rate:.0f} tokens/s (not counted)")
    return min(seconds, key=lambda batch_size: seconds[batch_size])


def batch_sizes(size: Size, num_requests: int) -> list[int]:
    """The sizes worth trying for so many requests."""
    return [batch_size for batch_size in size.batch_sizes if batch_size <= num_requests] or [num_requests]


def contest(
    bench: Bench,
    label: str,
    entrants: Sequence[Entrant],
    make: Callable[[int], list[Request]],
) -> dict[str, list[float]]:
    """Tokens per second of each side and repeat, the sides in turn; a peer that fails is left out from then on."""
    rates: dict[str, list[float]] = {entrant.side: [] for entrant in entrants}
    for repeat in range(bench.size.num_repeats):
        requests = make(repeat)
        for entrant in entrants:
            if entrant.side not in rates:
                continue
            try:
                outcome = bench.side(entrant.side).run(entrant.requests(requests), **entrant.options)
            except SideFailed as error:
                if entrant.side == OURS:
                    raise
                bench.results.unmeasured[f"{entrant.side}, {label}"] = str(error)
                bench.progress.say(f"{entrant.side} is left out: {error}")
                del rates[entrant.side]
                continue
            rate = num_output_tokens(requests) / outcome.seconds
            rates[entrant.side].append(rate)
            entrant.outcomes.append(outcome)
            turn = f"{repeat + 1}/{bench.size.num_repeats}"
            bench.progress.turn(f"{label}, {turn}, {entrant.side}: {rate:.0f} tokens/s")
    return rates


def note_equal_ids(bench: Bench, case: str, label: str, entrants: Sequence[Entrant]) -> None:
    """How many ids of the timed turns are equal, of which in 16 bits the last may decide between two tokens."""
    ours = next((entrant for entrant in entrants if entrant.side == OURS), None)
    for entrant in entrants:
        if entrant is ours or ours is None or entrant.side == BASE_ONLY or not entrant.outcomes:
            continue
        share = equal_share(ours.outcomes[0].token_ids, entrant.outcomes[0].token_ids)
        bench.results.checks.append(
            Check(case=case, what=f"{label}, {bench.dtype}, {entrant.side}", share=share, is_required=False)
        )


def peers_ready(bench: Bench, peers: Sequence[str], adapters: Sequence[str]) -> list[str]:
    """Those of the peers that run, with the adapters loaded; why the others do not is in the results."""
    ready = []
    for peer in peers:
        try:
            side = bench.side(peer)
            if peer != BASE_ONLY:
                side.load(adapters)
        except SideFailed as error:
            bench.progress.say(f"{peer} is left out: {error}")
        else:
            ready.append(peer)
    return ready


def measured(
    bench: Bench,
    case: str,
    side: str,
    values: list[float],
    *,
    metric: str = "throughput",
    unit: str = "tokens/s",
    x: float | None = None,
    floor_share: float | None = None,
) -> None:
    """Keep a measurement, with five digits: no clock here tells more."""
    kept = [float(f"{value:.5g}") for value in values]
    bench.results.measurements.append(
        Measurement(case=case, side=side, metric=metric, unit=unit, values=kept, x=x, floor_share=floor_share)
    )


def ratio_row(
    bench: Bench,
    case: str,
    what: str,
    peer: str,
    rates: dict[str, list[float]],
    goal: Goal,
    *,
    floor_share: float | None = None,
) -> None:
    """A row of our throughput over a peer's; an unmeasured peer's row says why."""
    ours, theirs = median(rates[OURS]), rates.get(peer)
    value = median(theirs) if theirs else None
    note = _FAVOURS.get(peer, "")
    if value is None:
        reasons = bench.results.unmeasured
        note = "not measured: " + next((why for key, why in reasons.items() if key.startswith(peer)), "no reason")
    bench.results.rows.append(
        Row(
            case=case,
            what=what,
            unit="tokens/s",
            ours=ours,
            peer=peer,
            peer_value=value,
            compared=None if value is None else ours / value,
            must=goal.must,
            stretch=goal.stretch,
            at_most=goal.at_most,
            floor_share=floor_share,
            note=note,
        )
    )


_FAVOURS = {
    "peft": "padded batches sorted by output length, which no server knows before; padding changes its answers",
    "transformers-cb": "takes no soft prompt: it computes the base model alone, which is less work",
    "vllm-cpu": "prompt_embeds for the soft prompt, embedded beforehand and not timed; nothing is detokenized",
}
