"""A model's shape and embedding rows, read from its files without torch."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from softprompt_api.formats.values import as_float32

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes that decide how fast a model can be.

    Attributes:
        num_parameters: that take part in computing a token; an embedding table that is only looked up does not.
        kv_bytes_per_token: keys and values of one position over all layers, at 2 bytes a value.
    """

    num_parameters: int
    hidden_size: int
    vocab_size: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    path: Path
    dtype: str
    shape: list[int]
    start: int


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = dict(_tensors(folder))
    num_parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    embedding = _embedding(tensors)
    if any(name.startswith("lm_head") for name in tensors):
        num_parameters -= prod(embedding.shape)
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    vocab_size, hidden_size = embedding.shape
    return ModelShape(
        num_parameters=num_parameters,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        kv_bytes_per_token=2 * 2 * config["num_hidden_layers"] * num_kv_heads * head_dim,
    )


def read_embedding_rows(folder: Path, token_ids: list[int]) -> np.ndarray:
    """Rows of the embedding table: [len(token_ids), hidden] float32."""
    tensor = _embedding(dict(_tensors(folder)))
    row_bytes = tensor.shape[1] * _ITEM_BYTES[tensor.dtype]
    rows = []
    with tensor.path.open("rb") as file:
        for token_id in token_ids:
            file.seek(tensor.start + token_id * row_bytes)
            rows.append(as_float32(file.read(row_bytes), tensor.dtype))
    return np.stack(rows)


def read_linears(folder: Path) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linears of a model's layers, by their dotted paths, where their names say so."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in _tensors(folder)
        if name.endswith("_proj.weight")
    }


def _tensors(folder: Path) -> Iterator[tuple[str, _Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                yield name, _Tensor(path=path, dtype=entry["dtype"], shape=entry["shape"], start=start)


def _embedding(tensors: dict[str, _Tensor]) -> _Tensor:
    for name, tensor in tensors.items():
        if name.endswith(_EMBEDDINGS):
            return tensor
    raise ValueError(f"no embedding table among the tensors; expected a name that ends with one of {_EMBEDDINGS}")
