"""`python -m benchmarks.gpu`: decoding on one GPU (B4, and the soft prompts of B5), with random weights, offline.

Needs torch, triton, transformers and peft: no service and no wire. There is no LoRA to measure in B5.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import goals
from benchmarks.bench import CB_BLOCK_POSITIONS, OURS, Bench
from benchmarks.cases.common import BASE_ONLY, check_exact, measured
from benchmarks.conditions import read_conditions
from benchmarks.floor import decode_floor_s
from benchmarks.goals import Goal
from benchmarks.model_files import read_shape
from benchmarks.progress import Progress
from benchmarks.results import Results, Row
from benchmarks.sides import SideFailed
from benchmarks.sizes import FULL, TINY, Size
from benchmarks.stats import median, steady_rate
from benchmarks.table import render, render_checks
from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens

CASES = ("B4", "B5")
MODELS = ("1b", "8b")
_BATCHES = (1, 32, 256)
_PEER_BATCHES = (32, 256)
_CONTEXT = 512
_NUM_TOKENS = 128
_NUM_VIRTUAL_TOKENS = 20
_TINY_BATCHES = (1, 3)
_TINY_CONTEXT, _TINY_NUM_TOKENS = 32, 16
# Positions in one block of transformers' continuous batching, by its default.
# Room for what stays cached beside the running sequences.
_KV_MARGIN = 1.1
_MODEL_TIMEOUT_S = 900.0


class GpuBench:
    """One model's cases.

    Args:
        name: of the shape.
        bench: for this model.
        batches: sizes to measure; the largest is also B5's.
        context: mean length of a sequence while it is timed.
        num_tokens: of each output.
    """

    def __init__(self, name: str, bench: Bench, *, batches: Sequence[int], context: int, num_tokens: int) -> None:
        self._name = name
        self._bench = bench
        self._batches = batches
        self._context = context
        self._num_tokens = num_tokens

    def run_b4(self) -> None:
        """Decode steps against the floor, and whole jobs against transformers' continuous batching."""
        for batch in self._batches:
            self._decode(batch)

    def run_b5(self) -> None:
        """As many sequences, each with a soft prompt of its own, against the base model with the same text."""
        bench, count = self._bench, max(self._batches)
        adapters = bench.adapters.make(count, _NUM_VIRTUAL_TOKENS)
        side = bench.side(OURS)
        side.load(adapters)
        side.run(self._requests(-1, count, adapters))
        rates: dict[str, list[float]] = {"base": [], "soft": []}
        for repeat in range(bench.size.num_repeats):
            for kind, used in (("base", [None]), ("soft", adapters)):
                outcome = side.run(self._requests(repeat, count, used))
                rates[kind].append(steady_rate(outcome.token_times_s))
                bench.progress.turn(f"{self._name}, {count} sequences, {kind}: {rates[kind][-1]:,.0f} tokens/s")
        for kind, values in rates.items():
            measured(bench, "B5", f"ours, {kind}, {self._name}", values, metric="decode", x=count)
        soft, base = median(rates["soft"]), median(rates["base"])
        self._row(
            "B5",
            f"{self._name}, {count} soft prompts of {_NUM_VIRTUAL_TOKENS}",
            soft,
            peer="ours, base model",
            peer_value=base,
            compared=soft / base,
            goal=goals.SOFT_OVER_BASE,
        )

    def _requests(self, repeat: int, count: int, adapters: Sequence[str | None]) -> list[Request]:
        """Prompts such that the mean context over the output is `context`."""
        prompt = Lengths(
            shortest=self._context - self._num_tokens // 2, longest=self._context - self._num_tokens // 2
        )
        return make_requests(
            seed=1,
            repeat=repeat,
            count=count,
            prompts=prompt,
            outputs=Lengths(shortest=self._num_tokens, longest=self._num_tokens),
            vocab_size=self._bench.shape.vocab_size,
            adapters=adapters,
        )

    def _decode(self, batch: int) -> None:
        bench = self._bench
        peer = BASE_ONLY if batch in _PEER_BATCHES or bench.size is TINY else ""
        ours = bench.side(OURS)
        ours.run(self._requests(-1, batch, [None]))
        decode, jobs, peer_jobs = [], [], []
        for repeat in range(bench.size.num_repeats):
            requests = self._requests(repeat, batch, [None])
            outcome = ours.run(requests)
            decode.append(steady_rate(outcome.token_times_s))
            jobs.append(num_output_tokens(requests) / outcome.seconds)
            bench.progress.turn(f"{self._name}, batch {batch}, ours: {decode[-1]:,.0f} tokens/s decoding")
            if peer and (rate := self._peer(peer, requests, warm=repeat > 0)) is not None:
                peer_jobs.append(rate)
        floor = batch / decode_floor_s(batch, self._context, bench.shape, bench.limits)
        share = median(decode) / floor
        where = f"{self._name}, batch {batch}"
        measured(bench, "B4", f"ours, {self._name}", decode, metric="decode", x=batch, floor_share=share)
        self._row(
            "B4",
            f"{where}, decoding",
            median(decode),
            peer="the machine's floor",
            peer_value=floor,
            compared=share,
            goal=goals.DECODE_SHARE.get((self._name, batch), goals.NONE),
            floor_share=share,
        )
        if peer:
            value = median(peer_jobs) if peer_jobs else None
            self._row(
                "B4",
                f"{where}, prompts and outputs",
                median(jobs),
                peer=f"{peer} (sdpa)",
                peer_value=value,
                compared=median(jobs) / value if value else None,
                goal=goals.DECODE_OVER_TRANSFORMERS.get(batch, goals.NONE),
            )

    def _peer(self, peer: str, requests: list[Request], *, warm: bool) -> float | None:
        bench = self._bench
        try:
            side = bench.side(peer)
            if not warm:
                side.run(self._requests(-1, len(requests), [None]))
            rate = num_output_tokens(requests) / side.run(requests).seconds
        except SideFailed as error:
            bench.results.unmeasured[f"{peer}, {self._name}, batch {len(requests)}"] = str(error)
            bench.progress.say(f"{peer} is left out: {error}")
            return None
        bench.progress.turn(f"{self._name}, batch {len(requests)}, {peer}: {rate:,.0f} tokens/s")
        return rate

    def _row(
        self,
        case: str,
        what: str,
        ours: float,
        *,
        peer: str,
        peer_value: float | None,
        compared: float | None,
        goal: Goal,
        floor_share: float | None = None,
    ) -> None:
        self._bench.results.rows.append(
            Row(
                case=case,
                what=what,
                unit="tokens/s",
                ours=ours,
                peer=peer,
                peer_value=peer_value,
                compared=compared,
                must=goal.must,
                stretch=goal.stretch,
                floor_share=floor_share,
            )
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to try the bench itself")
    parser.add_argument("--only", default=",".join(CASES), help="cases")
    parser.add_argument("--models", default=",".join(MODELS), help="shapes")
    parser.add_argument("--peers", default=BASE_ONLY, help=f"{BASE_ONLY}, or none")
    parser.add_argument("--repeats", type=int, default=FULL.num_repeats)
    parser.add_argument(
        "--folder", type=Path, help="where models are written, and found again; default: temporary"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; default: a new one in benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run; 0 when every asked case was measured, else 1."""
    arguments = parse(argv)
    size = TINY if arguments.tiny else dataclasses.replace(FULL, num_repeats=arguments.repeats)
    models = ["tiny"] if arguments.tiny else arguments.models.split(",")
    cases = arguments.only.split(",")
    results = Results(size=size.name, num_repeats=size.num_repeats, conditions=read_conditions(list(argv)))
    batches = _TINY_BATCHES if arguments.tiny else _BATCHES
    turns = {"B4": size.num_repeats * (len(batches) + len(_PEER_BATCHES)), "B5": size.num_repeats * 2}
    arguments.out = arguments.out or results.default_path()
    progress = Progress({f"{case} {model}": turns[case] for model in models for case in cases})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="softprompt-bench-")))
        for model in models:
            _run_model(model, cases, arguments, size, folder, results, progress)
    results.write(arguments.out)
    print(f"\n{render(results.rows)}\n{render_checks(results)}\nwritten to {arguments.out}")
    return 1 if any(name.startswith(CASES) for name in results.unmeasured) else 0


def _run_model(
    name: str,
    cases: Sequence[str],
    arguments: argparse.Namespace,
    size: Size,
    folder: Path,
    results: Results,
    progress: Progress,
) -> None:
    context, num_tokens = (_TINY_CONTEXT, _TINY_NUM_TOKENS) if arguments.tiny else (_CONTEXT, _NUM_TOKENS)
    batches = _TINY_BATCHES if arguments.tiny else _BATCHES
    longest = context + num_tokens + _NUM_VIRTUAL_TOKENS
    model = (arguments.folder or folder) / f"random-{name}"
    _make_model(name, model, arguments.device, progress)
    shape = read_shape(model)
    positions = int(max(batches) * longest * _KV_MARGIN)
    num_blocks = max(batches) * -(-longest // CB_BLOCK_POSITIONS) + 1
    settings = {
        OURS: {"kv_cache_bytes": positions * shape.kv_bytes_per_token, "max_model_len": longest},
        BASE_ONLY: {"num_blocks": num_blocks},
    }
    with Bench(
        model=model,
        device=arguments.device,
        folder=folder / name,
        peers=() if arguments.peers == "none" else (BASE_ONLY,),
        size=size,
        num_threads=None,
        results=results,
        progress=progress,
        settings=settings,
    ) as bench:
        if not results.limits:
            bench.measure_limits()
        check = f"B4 and B5 {name}"
        with bench.case(check):
            # Before the sides in bfloat16 take the memory.
            adapters = bench.adapters.make(size.check_requests // 2, _NUM_VIRTUAL_TOKENS)
            check_exact(bench, "B4, B5", f"{name}, base and soft prompts in one batch", [None, *adapters])
        if check in results.unmeasured:
            return
        gpu = GpuBench(name, bench, batches=batches, context=context, num_tokens=num_tokens)
        for case, run in (("B4", gpu.run_b4), ("B5", gpu.run_b5)):
            if case in cases:
                with bench.case(f"{case} {name}"):
                    run()
                results.write(arguments.out)  # whatever ends the run takes no finished case along
            # Its memory is not needed any more.
            bench.close(BASE_ONLY)


def _make_model(name: str, folder: Path, device: str, progress: Progress) -> None:
    if (folder / "config.json").exists():
        return
    progress.say(f"drawing and writing the weights of {name}")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_model", name, str(folder), device],
        timeout=_MODEL_TIMEOUT_S,
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
