"""Ours: the engine in this process, as its service runs it."""

import gc
import hashlib
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from softprompt_api.formats import adapter_digest, parse_config, read_folder
from softprompt_api.params import SamplingParams
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.cores import Binding
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import (
    AddRequest,
    Finish,
    LoadAdapter,
    LoadLora,
    SoftPromptPart,
    TextPart,
)
from softprompt_inference.model.source import native_kernels_dir

from benchmarks.workers.protocol import main
from benchmarks.workload import Outcome, Request


class EngineWorker:
    """Runs requests on an engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loaded: dict[str, LoadAdapter | LoadLora] = {}
        self._num_requests = 0

    def load(self, adapters: Sequence[str]) -> None:
        """Put adapters on the device."""
        for adapter in adapters:
            if adapter not in self._loaded:
                self._loaded[adapter] = command = _read(Path(adapter))
                self._engine.handle(command)
        while self._engine.has_work:  # a LoRA is loaded piece by piece
            self._engine.step()

    def run(self, requests: Sequence[Request], **_options: Any) -> Outcome:
        """Add all requests, then step until the last has ended."""
        commands = [self._command(request) for request in requests]
        index_of = {command.request_id: index for index, command in enumerate(commands)}
        token_ids: list[list[int]] = [[] for _ in requests]
        token_times_s: list[list[float]] = [[] for _ in requests]
        start = time.perf_counter()
        for command in commands:
            self._engine.handle(command)
        while self._engine.has_work:
            outputs = self._engine.step().outputs
            now = time.perf_counter() - start
            for output in outputs:
                if output.finish is Finish.ERROR or output.token_id is None:
                    raise RuntimeError(f"a request failed: {output.error_message}")
                index = index_of[output.request_id]
                token_ids[index].append(output.token_id)
                token_times_s[index].append(now)
        seconds = time.perf_counter() - start
        return Outcome(seconds=seconds, token_ids=token_ids, token_times_s=token_times_s)

    def _command(self, request: Request) -> AddRequest:
        self._num_requests += 1
        prompt: list[TextPart | SoftPromptPart] = [TextPart(token_ids=request.prompt_ids)]
        lora = ""
        match None if request.adapter is None else self._loaded[request.adapter]:
            case LoadAdapter(digest=digest):
                prompt.insert(0, SoftPromptPart(digest=digest))
            case LoadLora(digest=lora):
                pass
        params = SamplingParams(temperature=0.0, max_tokens=request.num_tokens, ignore_eos=True)
        return AddRequest(request_id=str(self._num_requests), prompt=prompt, params=params, lora=lora)


def make(
    *,
    model: str,
    device: str,
    dtype: str,
    kv_cache_bytes: int,
    num_threads: int | None,
    share: bool,
    max_model_len: int | None = None,
    max_num_sequences: int = 256,
    max_loras: int = 0,
    max_lora_rank: int = 64,
) -> EngineWorker:
    """An engine.

    Args:
        model: Hugging Face folder.
        kv_cache_bytes: memory for KV pages.
        num_threads: of torch; None: its own choice.
        share: whether the KV of soft prompts is shared between requests.
        max_model_len: longest sequence; None: the model's own limit.
        max_num_sequences: most sequences in one batch.
        max_loras, max_lora_rank: most LoRAs on the device, and their largest rank.
    """
    config = EngineConfig(
        model_path=model,
        device=device,
        dtype=dtype,
        num_threads=num_threads,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=max_model_len,
        max_num_sequences=max_num_sequences,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        share=share,
        native_cache_dir=str(native_kernels_dir()),
    )
    from softprompt_inference.model.runner import load_runner

    worker = EngineWorker(Engine(load_runner(config, print), config))
    gc.collect()
    gc.freeze()  # as the engine's process does
    return worker


def _make_bound(*, num_threads: int | None, **settings: Any) -> EngineWorker:
    """An engine on cores of its own, as its service's is."""
    binding = Binding()
    with binding.importing(num_threads):
        import_module("torch")
    worker = make(num_threads=num_threads, **settings)
    binding.bind()
    return worker


def _read(folder: Path) -> LoadAdapter | LoadLora:
    files = read_folder(folder)
    spec = parse_config(files.config_json)
    data = files.tensors_path.read_bytes()
    digest = adapter_digest(spec, hashlib.sha256(data).hexdigest())
    return Adapter.read(digest, spec, data).load_command()


if __name__ == "__main__":
    main(_make_bound, ["torch", "transformers"])
