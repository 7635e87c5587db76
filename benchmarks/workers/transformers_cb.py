"""transformers' continuous batching. It takes token ids only: no soft prompt, the base model alone."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.workers.protocol import main
from benchmarks.workload import Outcome, Request

# A request is not cut off by an end of sequence that no token has.
_NO_EOS = -1
_WAIT_S = 1.0
# Newer versions change the attention that was asked for, unless they are told not to.
_FIELDS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
_KEEP_SDPA = {"auto_switch_to_flash": False} if "auto_switch_to_flash" in _FIELDS else {}


class TransformersContinuousBatching:
    """A model with a manager that runs as long as the process: its start is not timed.

    Args:
        num_blocks: KV blocks; None: transformers' own plan.
    """

    def __init__(
        self, *, model: str, device: str, dtype: str, num_threads: int | None = None, num_blocks: int | None = None
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        loaded = loaded.to(device).eval()
        self._manager = loaded.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=_NO_EOS, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=num_blocks, **_KEEP_SDPA),
        )
        self._manager.warmup()
        self._manager.start()

    def load(self, adapters: Sequence[str]) -> None:
        """Refuse them."""
        if adapters:
            raise NotImplementedError("transformers' continuous batching takes no soft prompts")

    def run(self, requests: Sequence[Request], **_options: Any) -> Outcome:
        """Add all requests, then wait for the last."""
        if any(request.adapter is not None for request in requests):
            raise NotImplementedError("transformers' continuous batching takes no soft prompts")
        start = time.perf_counter()
        index_of: dict[str, int] = {}
        for index, request in enumerate(requests):
            name = self._manager.add_request(
                request.prompt_ids, max_new_tokens=request.num_tokens, eos_token_id=_NO_EOS
            )
            if name is None:
                raise RuntimeError("the manager takes no requests any more")
            index_of[name] = index
        token_ids: list[list[int]] = [[] for _ in requests]
        unfinished = set(index_of)
        while unfinished:
            result = self._manager.get_result(timeout=_WAIT_S)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the manager has ended")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                token_ids[index_of[result.request_id]] = list(result.generated_tokens)
                unfinished.discard(result.request_id)
        return Outcome(seconds=time.perf_counter() - start, token_ids=token_ids, token_times_s=[])


if __name__ == "__main__":
    main(TransformersContinuousBatching, ["torch", "transformers"])
