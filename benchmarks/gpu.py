"""`python -m benchmarks.gpu`: decoding on one GPU (B4, B5), with random weights, offline.

Needs torch, triton, transformers and peft: no service and no wire.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import goals
from benchmarks.bench import CB_BLOCK_POSITIONS, ORACLE, OURS, Bench
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
_NUM_LORAS, _LORA_RANK = 32, 16
# Of each output where PEFT takes part, which computes a mixed batch's LoRAs one after the other.
_NUM_PEFT_TOKENS = 32
_TINY_BATCHES = (1, 3)
_TINY_CONTEXT, _TINY_NUM_TOKENS = 32, 16
PEFT = "peft"
PEERS = (BASE_ONLY, PEFT)
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
        save: called with every row, as whatever ends the run shall take none along.
    """

    def __init__(
        self,
        name: str,
        bench: Bench,
        *,
        batches: Sequence[int],
        context: int,
        num_tokens: int,
        save: Callable[[], None],
    ) -> None:
        self._name = name
        self._bench = bench
        self._batches = batches
        self._context = context
        self._num_tokens = num_tokens
        self._save = save

    def run_b4(self) -> None:
        """Decode steps against the floor, and whole jobs against transformers' continuous batching."""
        for batch in self._batches:
            self._decode(batch)

    def run_b5(self) -> None:
        """As many sequences, each with a soft prompt of its own or one of some LoRAs, against the base model."""
        bench, count = self._bench, max(self._batches)
        prompts = bench.adapters.make(count, _NUM_VIRTUAL_TOKENS)
        loras = bench.adapters.make_loras(_NUM_LORAS, _LORA_RANK)
        kinds: dict[str, Sequence[str | None]] = {"base": [None], "soft": prompts, "LoRA": loras}
        side = bench.side(OURS)
        side.load([*prompts, *loras])
        for adapters in kinds.values():
            side.run(self._requests("B5", -1, count, adapters))
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(bench.size.num_repeats):
            for kind, adapters in kinds.items():
                outcome = side.run(self._requests("B5", repeat, count, adapters))
                rates[kind].append(steady_rate(outcome.token_times_s))
                bench.progress.turn(f"{self._name}, {count} sequences, {kind}: {rates[kind][-1]:,.0f} tokens/s")
        for kind, values in rates.items():
            measured(bench, "B5", f"ours, {kind}, {self._name}", values, metric="decode", x=count)
        base = median(rates["base"])
        whats = {"soft": f"{count} soft prompts of {_NUM_VIRTUAL_TOKENS}", "LoRA": _what_loras(count)}
        for kind, goal in (("soft", goals.SOFT_OVER_BASE), ("LoRA", goals.LORA_OVER_BASE)):
            value, what = median(rates[kind]), f"{self._name}, {whats[kind]}"
            self._row("B5", what, value, peer="ours, base model", peer_value=base, goal=goal)
        self._compare_loras(count, loras)

    def _compare_loras(self, count: int, loras: Sequence[str]) -> None:
        """Prompts and outputs of mixed LoRAs against PEFT's mixed batch."""
        bench, options = self._bench, {"batch_size": count, "mix_loras": True}
        jobs: dict[str, list[float]] = {OURS: [], PEFT: []}
        try:
            bench.side(PEFT).load(loras)
            bench.side(PEFT).run(self._requests("B5, PEFT", -1, count, loras, num_tokens=2), **options)
            for repeat in range(bench.size.num_repeats):
                requests = self._requests("B5, PEFT", repeat, count, loras, num_tokens=_NUM_PEFT_TOKENS)
                for name, rates in jobs.items():
                    rates.append(num_output_tokens(requests) / bench.side(name).run(requests, **options).seconds)
                    bench.progress.turn(f"{self._name}, {_what_loras(count)}, {name}: {rates[-1]:,.0f} tokens/s")
        except SideFailed as error:
            self._leave_out(PEFT, f"{self._name}, LoRAs", error)
            return
        what = f"{self._name}, {_what_loras(count)}, prompts and {_NUM_PEFT_TOKENS} tokens"
        ours, theirs = median(jobs[OURS]), median(jobs[PEFT])
        self._row("B5", what, ours, peer="PEFT, mixed batch", peer_value=theirs, goal=goals.LORA_OVER_PEFT)

    def _requests(
        self, what: str, repeat: int, count: int, adapters: Sequence[str | None], *, num_tokens: int | None = None
    ) -> list[Request]:
        """Prompts such that the mean context over the output is `context`."""
        num_tokens = num_tokens or self._num_tokens
        length = self._context - num_tokens // 2
        return make_requests(
            f"{what}, {self._name}, {count}",
            seed=1,
            repeat=repeat,
            count=count,
            prompts=Lengths(shortest=length, longest=length),
            outputs=Lengths(shortest=num_tokens, longest=num_tokens),
            vocab_size=self._bench.shape.vocab_size,
            adapters=adapters,
        )

    def _decode(self, batch: int) -> None:
        bench = self._bench
        peer = BASE_ONLY if batch in _PEER_BATCHES or bench.size is TINY else ""
        ours = bench.side(OURS)
        ours.run(self._requests("B4", -1, batch, [None]))
        decode, jobs, peer_jobs = [], [], []
        for repeat in range(bench.size.num_repeats):
            requests = self._requests("B4", repeat, batch, [None])
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
                goal=goals.DECODE_OVER_TRANSFORMERS.get(batch, goals.NONE),
            )

    def _peer(self, peer: str, requests: list[Request], *, warm: bool) -> float | None:
        bench = self._bench
        try:
            side = bench.side(peer)
            if not warm:
                side.run(self._requests("B4", -1, len(requests), [None]))
            rate = num_output_tokens(requests) / side.run(requests).seconds
        except SideFailed as error:
            self._leave_out(peer, f"{self._name}, batch {len(requests)}", error)
            return None
        bench.progress.turn(f"{self._name}, batch {len(requests)}, {peer}: {rate:,.0f} tokens/s")
        return rate

    def _leave_out(self, peer: str, what: str, error: SideFailed) -> None:
        self._bench.results.unmeasured[f"{peer}, {what}"] = str(error)
        self._bench.progress.say(f"{peer} is left out: {error}")

    def _row(
        self,
        case: str,
        what: str,
        ours: float,
        *,
        peer: str,
        peer_value: float | None,
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
                compared=None if peer_value is None else ours / peer_value,
                must=goal.must,
                stretch=goal.stretch,
                floor_share=floor_share,
            )
        )
        self._save()


def _what_loras(count: int) -> str:
    return f"{count} sequences, {_NUM_LORAS} LoRAs of rank {_LORA_RANK}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: to try the bench itself")
    parser.add_argument("--only", default=",".join(CASES), help="cases")
    parser.add_argument("--models", default=",".join(MODELS), help="shapes")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers to measure, or none")
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
    turns = {"B4": size.num_repeats * (len(batches) + len(_PEER_BATCHES)), "B5": size.num_repeats * 5}
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
        OURS: {
            "kv_cache_bytes": positions * shape.kv_bytes_per_token,
            "max_model_len": longest,
            "max_loras": _NUM_LORAS if "B5" in cases else 0,
            "max_lora_rank": _LORA_RANK,
        },
        # Captured for no more than are checked: in float32, kernels compile for long.
        f"{OURS} {ORACLE}": {"max_num_sequences": size.check_requests},
        BASE_ONLY: {"num_blocks": num_blocks},
    }
    with Bench(
        model=model,
        device=arguments.device,
        folder=folder / name,
        peers=() if arguments.peers == "none" else arguments.peers.split(","),
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
            for side in (OURS, PEFT):
                bench.close(side, ORACLE)  # PEFT takes no LoRA beside soft prompts
            if "B5" in cases:
                loras = bench.adapters.make_loras(size.check_requests // 2, _LORA_RANK)
                check_exact(bench, "B5", f"{name}, LoRAs in one batch", loras)
        if check in results.unmeasured:
            return
        gpu = GpuBench(
            name,
            bench,
            batches=batches,
            context=context,
            num_tokens=num_tokens,
            save=lambda: results.write(arguments.out),
        )
        for case, run in (("B4", gpu.run_b4), ("B5", gpu.run_b5)):
            if case in cases:
                with bench.case(f"{case} {name}"):
                    run()
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
