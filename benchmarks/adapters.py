"""Adapters to measure with: PEFT folders, made at run time from a seed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from softprompt_api.formats import CONFIG_FILE, TENSORS_FILE

from benchmarks.model_files import ModelShape, read_embedding_rows, read_linears

# Rows that training leaves near the vocabulary's: far from it, many models lose all precision.
_NOISE_SHARE = 0.1
_LORA_DEVIATION = 0.02


def peft_lora(
    linears: Mapping[str, tuple[int, int]], number: int, rank: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """PEFT's config and tensors, in float16, of a LoRA on all these linears (outputs, inputs)."""
    random = np.random.default_rng([number, rank])
    tensors = {}
    for name, (num_out, num_in) in linears.items():
        for matrix, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
            values = np.float32(_LORA_DEVIATION) * random.standard_normal(shape, dtype=np.float32)
            tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = values.astype(np.float16)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    return config, tensors


class AdapterMaker:
    """Writes adapters for one model.

    Args:
        model: its Hugging Face folder.
        shape: its shape.
        folder: where adapters are written.
    """

    def __init__(self, model: Path, shape: ModelShape, folder: Path) -> None:
        self._model = model
        self._shape = shape
        self._folder = folder

    def make(self, count: int, num_virtual_tokens: int) -> list[str]:
        """Folders of that many different soft prompts, the same ones whenever they are asked for."""
        return [self._make(number, num_virtual_tokens) for number in range(count)]

    def make_loras(self, count: int, rank: int) -> list[str]:
        """Folders of that many different LoRAs on every linear of the layers, likewise."""
        return [self._make_lora(number, rank) for number in range(count)]

    def _make(self, number: int, num_virtual_tokens: int) -> str:
        folder = self._folder / f"nv{num_virtual_tokens}-{number}"
        if not folder.exists():
            rows = self._rows(number, num_virtual_tokens)
            config = {
                "peft_type": "PROMPT_TUNING",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "",
                "inference_mode": True,
                "num_virtual_tokens": num_virtual_tokens,
                "token_dim": self._shape.hidden_size,
                "num_transformer_submodules": 1,
                "prompt_tuning_init": "RANDOM",
            }
            _write(folder, config, {"prompt_embeddings": rows})
        return str(folder)

    def _make_lora(self, number: int, rank: int) -> str:
        folder = self._folder / f"lora{rank}-{number}"
        if not folder.exists():
            _write(folder, *peft_lora(read_linears(self._model), number, rank))
        return str(folder)

    def _rows(self, number: int, num_virtual_tokens: int) -> np.ndarray:
        """Embeddings of random tokens with a little noise: [num_virtual_tokens, hidden] float32."""
        random = np.random.default_rng([number, num_virtual_tokens])
        token_ids = random.integers(self._shape.vocab_size, size=num_virtual_tokens).tolist()
        rows = read_embedding_rows(self._model, token_ids)
        noise = random.standard_normal(rows.shape, dtype=np.float32)
        rows += noise * np.float32(_NOISE_SHARE * rows.std())
        return rows


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / TENSORS_FILE)
