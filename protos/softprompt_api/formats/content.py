"""What an adapter's file holds for serving, once it was verified: plain bytes, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One row per virtual token: an embedding, or keys and values of all layers.

    Attributes:
        data: `[num_virtual_tokens, row_size]`, row-major, little endian; keys and values lie in the
            memory of the whole file.
        dtype: "float32", "float16" or "bfloat16".
        row_size: the hidden size; for keys and values, `[layers, 2, key heads, head dimension]` laid flat.
        are_key_values: rows go into the KV cache as they are; otherwise, in front of the token embeddings.
    """

    data: bytes | memoryview
    dtype: str
    num_virtual_tokens: int
    row_size: int
    are_key_values: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """What is added to one linear layer: x goes to x + scale * b @ a @ x.

    Attributes:
        name: of the module in the model, for example "model.layers.0.self_attn.q_proj".
        a: `[rank, in_features]`, row-major, little endian; in the memory of the whole file.
        b: `[out_features, rank]`, row-major, little endian.
        dtype: of both, "float32", "float16" or "bfloat16".
    """

    name: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    a: memoryview
    b: memoryview
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """The modules of a LoRA, in order of their names."""

    modules: tuple[LoraModule, ...]


Content = Rows | Lora
