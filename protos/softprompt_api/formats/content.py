"""What an adapter's file holds for serving, once it was verified: plain bytes, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One row per virtual token: an embedding, or keys and values of all layers.

    Attributes:
        data: `[num_virtual_tokens, row_size]`, row-major, little endian.
        dtype: "float32", "float16" or "bfloat16".
        row_size: the hidden size; for keys and values, `[layers, 2, key heads, head dimension]` laid flat.
        are_key_values: rows go into the KV cache as they are; otherwise, in front of the token embeddings.
    """

    data: bytes
    dtype: str
    num_virtual_tokens: int
    row_size: int
    are_key_values: bool = False


Content = Rows
