"""`python -m benchmarks.gpu_profile`: the kernels of a decode step on a GPU, by time; the weights are random."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from softprompt_api.params import SamplingParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.plan import Chunk, Sample, StepPlan
from softprompt_inference.model.runner import ModelRunner, load_runner
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_model import SHAPES
from benchmarks.model_files import read_shape
from benchmarks.step import random_lora, with_loras

_GREEDY = SamplingParams(temperature=0)
_WARM_UP_STEPS, _STEPS = 3, 10
_MOST_KERNELS = 16


def decodes(count: int, context: int, page_size: int) -> StepPlan:
    """One token for each of so many sequences of that many positions, with pages of their own."""
    width = -(-context // page_size)
    sample = Sample(params=_GREEDY, seed=0, index=0)
    return StepPlan(
        chunks=[
            Chunk(
                token_ids=[5 + i],
                start=context - 1,
                page_ids=list(range(i * width, (i + 1) * width)),
                sample=sample,
            )
            for i in range(count)
        ]
    )


def kernel_times(runner: ModelRunner, plan: StepPlan) -> list[tuple[str, float, float]]:
    """(name, microseconds, launches) of each kernel of a step, the longest first; on a CPU, of each operation."""
    for _ in range(_WARM_UP_STEPS):
        runner.run(plan)
    on_cuda = runner.loaded.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as found:
        for _ in range(_STEPS):
            runner.run(plan)
    times = [
        (event.key, (event.self_device_time_total if on_cuda else event.self_cpu_time_total), event.count)
        for event in found.key_averages()
    ]
    times = [(name, total / _STEPS, count / _STEPS) for name, total, count in times if total]
    return sorted(times, key=lambda each: -each[1])


def compute_contexts(runner: ModelRunner, plan: StepPlan) -> None:
    """The keys and values that a step of decodes reads, one sequence after the other."""
    for seed, chunk in enumerate(plan.chunks):
        token_ids = Random(seed).choices(range(runner.loaded.vocab_size), k=chunk.start)
        runner.run(StepPlan(chunks=[replace(chunk, token_ids=token_ids, start=0)]))


def main(argv: Sequence[str]) -> None:
    """Print a Markdown table for each batch, without LoRA and with."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__)
    parser.add_argument("--model", default="1b", choices=SHAPES, help="its shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="1,32,256", help="sequences")
    parser.add_argument("--context", type=int, default=512, help="positions of each")
    parser.add_argument("--loras", type=int, default=32, help="LoRAs that they use in turn; 0: none")
    parser.add_argument("--lora-rank", type=int, default=16)
    arguments = parser.parse_args(argv)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    with tempfile.TemporaryDirectory(prefix="softprompt-profile-") as folder:
        model = Path(folder) / arguments.model
        command = [sys.executable, "-m", "benchmarks.gpu_model", arguments.model, str(model), arguments.device]
        subprocess.run(command, check=True)
        runner = load_runner(_config(arguments, model, max(batches)), lambda _: None)
    for slot in range(arguments.loras):
        list(runner.load_lora(slot, random_lora(runner.loaded.linears, arguments.lora_rank, seed=slot)))
    for batch in batches:
        plan = decodes(batch, arguments.context, runner.info.page_size)
        compute_contexts(runner, plan)
        _print_times(f"{arguments.model}, {batch} decodes", kernel_times(runner, plan))
        if arguments.loras:
            times = kernel_times(runner, with_loras(plan, arguments.loras))
            _print_times(f"{arguments.model}, {batch} decodes, {arguments.loras} LoRAs", times)


def _config(arguments: argparse.Namespace, model: Path, most_sequences: int) -> EngineConfig:
    positions = most_sequences * (arguments.context + EngineConfig(model_path="").page_size)
    return EngineConfig(
        model_path=str(model),
        device=arguments.device,
        dtype="bfloat16",
        kv_cache_bytes=positions * read_shape(model).kv_bytes_per_token,
        max_model_len=arguments.context,
        max_num_sequences=most_sequences,
        max_loras=arguments.loras,
        max_lora_rank=arguments.lora_rank,
    )


def _print_times(title: str, times: Sequence[tuple[str, float, float]]) -> None:
    together = sum(microseconds for _, microseconds, _ in times)
    print(f"\n| {title}: {together / 1e3:.2f} ms | µs | launches |\n|---|---|---|")
    for name, microseconds, launches in times[:_MOST_KERNELS]:
        print(f"| `{name[:90]}` | {microseconds:.1f} | {launches:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
