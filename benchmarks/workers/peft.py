"""PEFT: `generate` over padded batches, one adapter at a time, as it must for soft prompts; LoRAs also mixed."""

import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.workers.protocol import main
from benchmarks.workload import Outcome, Request

_PAD = 0
# PEFT's name for no adapter in a mixed batch.
_NO_ADAPTER = "__base__"


class Peft:
    """A model with PEFT's adapters around it."""

    def __init__(self, *, model: str, device: str, dtype: str, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        # Where a request names no end, transformers takes the model's own: a batch of one would stop there.
        self._base.generation_config.eos_token_id = None
        self._device = device
        self._adapted: Any = None
        self._names: dict[str, str] = {}

    def load(self, adapters: Sequence[str]) -> None:
        """Load adapters beside each other."""
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
            warnings.simplefilter("ignore", FutureWarning)
            for adapter in adapters:
                if adapter in self._names:
                    continue
                name = f"adapter{len(self._names)}"
                if self._adapted is None:
                    self._adapted = PeftModel.from_pretrained(self._base, adapter, adapter_name=name).eval()
                else:
                    self._adapted.load_adapter(adapter, adapter_name=name)
                self._names[adapter] = name

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], *, batch_size: int = 1, mix_loras: bool = False, **_options: Any
    ) -> Outcome:
        """Sorted by adapter, then by length, and cut into batches; a batch runs until its longest output is done.

        Sorting by a length that no server knows beforehand favours this side.

        Args:
            mix_loras: batches hold any LoRAs side by side.
        """
        token_ids: list[list[int]] = [[] for _ in requests]
        start = time.perf_counter()
        for batch in _batches(requests, batch_size, mix_loras=mix_loras):
            outputs = self._generate([requests[index] for index in batch], mix_loras=mix_loras)
            for index, output in zip(batch, outputs, strict=True):
                token_ids[index] = output[: requests[index].num_tokens]
        return Outcome(seconds=time.perf_counter() - start, token_ids=token_ids, token_times_s=[])

    def _generate(self, requests: Sequence[Request], *, mix_loras: bool) -> list[list[int]]:
        model, options = self._base, {}
        if mix_loras:
            model = self._adapted
            adapters = (request.adapter for request in requests)
            options["adapter_names"] = [_NO_ADAPTER if name is None else self._names[name] for name in adapters]
        elif (adapter := requests[0].adapter) is not None:
            model = self._adapted
            model.set_adapter(self._names[adapter])
        input_ids, mask = _pad([request.prompt_ids for request in requests])
        num_tokens = max(request.num_tokens for request in requests)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=_PAD, use_cache=True
        )
        outputs = model.generate(
            input_ids=input_ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=config,
            **options,
        )
        ids: list[list[int]] = outputs[:, input_ids.shape[1] :].tolist()
        return ids


def _batches(requests: Sequence[Request], batch_size: int, *, mix_loras: bool) -> Iterator[list[int]]:
    def adapter(index: int) -> str:
        return "" if mix_loras else requests[index].adapter or ""

    def lengths(index: int) -> tuple[str, int, int]:
        return adapter(index), requests[index].num_tokens, len(requests[index].prompt_ids)

    for _, group in groupby(sorted(range(len(requests)), key=lengths), key=adapter):
        indices = list(group)
        for first in range(0, len(indices), batch_size):
            yield indices[first : first + batch_size]


def _pad(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [n, longest prompt] int64, padded on the left."""
    width = max(map(len, prompts))
    ids = [[_PAD] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


if __name__ == "__main__":
    main(Peft, ["torch", "transformers", "peft"])
