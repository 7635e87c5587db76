"""`python -m benchmarks.step`: where the milliseconds of a CPU step go, by kind of step and part of the model."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from softprompt_api.params import SamplingParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import LoadLora, LoraModule
from softprompt_inference.engine.plan import Chunk, Sample, StepPlan
from softprompt_inference.model import attention, sampler
from softprompt_inference.model.lora.linears import Linear
from softprompt_inference.model.runner import ModelRunner, load_runner
from softprompt_inference.model.source import DEFAULT_MODEL, native_kernels_dir, resolve_model
from softprompt_inference.model.swaps import stacks
from softprompt_kernels import native
from softprompt_kernels.native.layer import DecoderLayer, DecoderLayers

_GREEDY = SamplingParams(temperature=0)
_KV_CACHE_BYTES = 2**30
_CONTEXTS = range(60, 110)
_DECODES = (1, 8, 16, 32, 58)
# (tokens, positions before them)
_PROMPTS = ((32, 20), (32, 100), (32, 512), (128, 60), (128, 512))
# (decodes, LoRAs that they use in turn)
_LORA_DECODES = ((1, 1), (16, 1), (16, 16), (58, 1), (58, 16))
_LORA_PROMPTS = ((128, 60),)
# What is timed, by the part it belongs to. None of them calls another.
_PARTS: Sequence[tuple[str, Any, str]] = (
    ("layers", DecoderLayer, "before"),
    ("layers", DecoderLayer, "after"),
    ("layers", DecoderLayers, "__call__"),
    ("attention", attention, "paged_attention"),
    ("products", native, "linear"),
    ("norms", native, "rms_norm"),
    ("keys, values", attention, "kv_write"),
    ("sampler", sampler, "launch"),
)


def decodes(count: int, page_size: int) -> StepPlan:
    """One token for each of so many sequences, at contexts spread over _CONTEXTS."""
    width = -(-_CONTEXTS.stop // page_size)
    return StepPlan(
        chunks=[
            _chunk([5], _CONTEXTS[7 * i % len(_CONTEXTS)], range(i * width, (i + 1) * width)) for i in range(count)
        ]
    )


def prompt(num_tokens: int, start: int, page_size: int) -> StepPlan:
    """A piece of one prompt."""
    pages = range(-(-(start + num_tokens) // page_size))
    return StepPlan(chunks=[_chunk(list(range(1, num_tokens + 1)), start, pages)])


def _chunk(token_ids: list[int], start: int, page_ids: Sequence[int]) -> Chunk:
    sample = Sample(params=_GREEDY, seed=0, index=0)
    return Chunk(token_ids=token_ids, start=start, page_ids=page_ids, sample=sample)


def random_lora(linears: Sequence[Linear], rank: int, seed: int) -> LoadLora:
    """A LoRA of all the linears, small enough to leave a language model."""
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> bytes:
        return (generator.standard_normal(shape, dtype=np.float32) * 0.01).tobytes()

    modules = [
        LoraModule(
            name=linear.name,
            rank=rank,
            scale=1.0,
            a=values(rank, linear.in_features),
            b=values(linear.out_features, rank),
        )
        for linear in linears
    ]
    return LoadLora(digest=f"sha256:{seed}", modules=modules, dtype="float32")


def with_loras(plan: StepPlan, count: int) -> StepPlan:
    """The same step, whose chunks use slots 0 … count − 1 in turn."""
    return StepPlan(chunks=[replace(chunk, lora=i % count) for i, chunk in enumerate(plan.chunks)])


def make_steps(page_size: int, *, only_lora: bool) -> list[tuple[str, int, StepPlan]]:
    """(label, number of LoRAs, step without them); those with LoRAs stand behind the same without."""
    steps = []
    for count in _DECODES:
        label, plan = f"{count} decode{'s' if count > 1 else ''}", decodes(count, page_size)
        steps += [(label, loras, plan) for loras in (0, *(n for tokens, n in _LORA_DECODES if tokens == count))]
    for count, start in _PROMPTS:
        label, plan = f"{count} tokens behind {start}", prompt(count, start, page_size)
        steps += [(label, loras, plan) for loras in (0, *(1 for each in _LORA_PROMPTS if each == (count, start)))]
    if only_lora:
        wanted = {label for label, loras, _ in steps if loras}
        steps = [step for step in steps if step[0] in wanted]
    return steps


class Stopwatch:
    """Seconds spent in _PARTS, while they are watched."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        for part, owner, name in _PARTS:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed


def fastest(runner: ModelRunner, plan: StepPlan, watch: Stopwatch, repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest of several runs, by part, with "rest" and "together"."""
    found: tuple[float, Mapping[str, float]] = (float("inf"), {})
    for _ in range(repeats):
        watch.seconds.clear()
        start = time.perf_counter()
        runner.run(plan)
        found = min(found, (time.perf_counter() - start, dict(watch.seconds)), key=lambda run: run[0])
    together, parts = found
    seconds = {**parts, "rest": together - sum(parts.values()), "together": together}
    return {part: 1e3 * value for part, value in seconds.items()}


def main(argv: Sequence[str]) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, .gguf file or hub id")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25, help="of each step; the fastest counts")
    parser.add_argument("--no-native-kernels", action="store_true", help="torch's operations alone")
    parser.add_argument("--one-by-one", action="store_true", help="each layer, and its attention, on its own")
    parser.add_argument("--lora-rank", type=int, default=16, help="of the LoRAs, which change all linears")
    parser.add_argument(
        "--only-lora", action="store_true", help="steps that some have a LoRA in, and the same without"
    )
    arguments = parser.parse_args(argv)
    if arguments.one_by_one:
        stacks.find = lambda *_: []
    runner = load_runner(
        EngineConfig(
            model_path=str(resolve_model(arguments.model, report=lambda _: None)),
            device="cpu",
            dtype=arguments.dtype,
            kv_cache_bytes=_KV_CACHE_BYTES,
            num_threads=arguments.threads,
            native_cache_dir=None if arguments.no_native_kernels else str(native_kernels_dir()),
        ),
        lambda _: None,
    )
    for slot in range(max(count for _, count in _LORA_DECODES)):
        list(runner.load_lora(slot, random_lora(runner.loaded.linears, arguments.lora_rank, seed=slot)))
    columns = [*dict.fromkeys(part for part, _, _ in _PARTS), "rest", "together"]
    print(f"| ms | {' | '.join(columns)} | of the same without LoRA |\n{'|---' * (len(columns) + 2)}|")
    watch, without = Stopwatch(), dict[str, float]()
    for label, count, plan in make_steps(runner.info.page_size, only_lora=arguments.only_lora):
        found = fastest(runner, with_loras(plan, count) if count else plan, watch, arguments.repeats)
        without.setdefault(label, found["together"])
        loras = f", {count} LoRA{'s' if count > 1 else ''}" if count else ""
        share = f"{found['together'] / without[label]:.2f}" if count else ""
        cells = [f"{found.get(column, 0):.1f}" for column in columns]
        print(f"| {label}{loras} | {' | '.join([*cells, share])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
