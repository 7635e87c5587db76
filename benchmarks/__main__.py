"""`python -m benchmarks`: measure the CPU cases beside their peers, print a table and keep the results as JSON."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from softprompt_inference.model.hardware import cpu_has_bfloat16
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model

from benchmarks.bench import PEERS, Bench
from benchmarks.cases import (
    b1_one_adapter,
    b2_many_adapters,
    b3_long_prompts,
    b6_cold_start,
    b7_gateway,
    b8_scale,
    b9_start,
)
from benchmarks.conditions import read_conditions
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.sizes import FULL, QUICK, SIZES, TINY
from benchmarks.table import render, render_checks

CASES = {
    module.CASE: module
    for module in (
        b1_one_adapter,
        b2_many_adapters,
        b3_long_prompts,
        b6_cold_start,
        b7_gateway,
        b8_scale,
        b9_start,
    )
}
_NUM_THREADS = 2
# Above it, others use the processors: figures say little then.
_BUSY_LOAD = 0.5


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, checked; wrong ones end the program with a plain line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const=QUICK.name, help="one short repeat")
    size.add_argument("--tiny", dest="size", action="store_const", const=TINY.name, help="try the bench itself")
    parser.add_argument("--only", type=_names(CASES), default=list(CASES), metavar="B1,B3", help="cases")
    parser.add_argument(
        "--peers", type=_names((*PEERS, "none")), default=list(PEERS), help=f"of {', '.join(PEERS)}; or none"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file or hub id")
    parser.add_argument("--threads", type=int, default=_NUM_THREADS, help="of each side's torch")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if cpu_has_bfloat16() else "float32",
        help="of all sides; default: bfloat16 where this processor multiplies it",
    )
    parser.add_argument("--out", type=Path, help="the JSON file; default: a new one in benchmarks/results")
    parser.set_defaults(size=FULL.name)
    arguments = parser.parse_args(argv)
    if "none" in arguments.peers:
        arguments.peers = []
    return arguments


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(known)

    def parse_names(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse_names


def main(argv: Sequence[str]) -> int:
    """Run; 0 when every asked case was measured, else 1."""
    arguments = parse(argv)
    size = SIZES[arguments.size]
    results = Results(size=size.name, num_repeats=size.num_repeats, conditions=read_conditions(list(argv)))
    expected = {name: CASES[name].expected_turns(size, len(arguments.peers)) for name in arguments.only}
    progress = Progress(expected)
    if results.conditions.load_average[0] > _BUSY_LOAD:
        progress.say(
            f"load average {results.conditions.load_average[0]:.1f}: others use this machine; trust nothing"
        )
    path = arguments.out or results.default_path()
    model = resolve_model(arguments.model, report=progress.say)
    with (
        tempfile.TemporaryDirectory(prefix="softprompt-bench-") as folder,
        Bench(
            model=model,
            device="cpu",
            folder=Path(folder),
            peers=arguments.peers,
            size=size,
            num_threads=arguments.threads,
            dtype=arguments.dtype,
            results=results,
            progress=progress,
        ) as bench,
    ):
        bench.measure_limits()
        for name in arguments.only:
            with bench.case(name):
                CASES[name].run(bench)
            results.write(path)  # whatever ends an hour's run takes no finished case along
        bench.measure_limits()
    results.write(path)
    print(f"\n{render(results.rows)}\n{render_checks(results)}\nwritten to {path}")
    return 1 if set(arguments.only) & results.unmeasured.keys() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
