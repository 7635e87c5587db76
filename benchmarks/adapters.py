"""Soft prompts to measure with: PEFT folders, made at run time from a seed."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from softprompt_api.formats import CONFIG_FILE, TENSORS_FILE

from benchmarks.model_files import ModelShape, read_embedding_rows

# Rows that training leaves near the vocabulary's: far from it, many models lose all precision.
_NOISE_SHARE = 0.1


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
        """Folders of that many different adapters, the same ones whenever they are asked for."""
        return [self._make(number, num_virtual_tokens) for number in range(count)]

    def _make(self, number: int, num_virtual_tokens: int) -> str:
        folder = self._folder / f"nv{num_virtual_tokens}-{number}"
        if not folder.exists():
            rows = self._rows(number, num_virtual_tokens)
            folder.mkdir(parents=True)
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
            (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
            save_file({"prompt_embeddings": rows}, folder / TENSORS_FILE)
        return str(folder)

    def _rows(self, number: int, num_virtual_tokens: int) -> np.ndarray:
        """Embeddings of random tokens with a little noise: [num_virtual_tokens, hidden] float32."""
        random = np.random.default_rng([number, num_virtual_tokens])
        token_ids = random.integers(self._shape.vocab_size, size=num_virtual_tokens).tolist()
        rows = read_embedding_rows(self._model, token_ids)
        noise = random.standard_normal(rows.shape, dtype=np.float32)
        rows += noise * np.float32(_NOISE_SHARE * rows.std())
        return rows
