"""What kinds share that give keys and values: one row per virtual token, for the KV caches of all layers.

PEFT lays a row out as `[2 * layers, key heads, head dimension]`: layer l's keys at 2 l, its values at 2 l + 1.
They go into the cache as they are, without rotary embedding. In these configs `num_attention_heads` is the number
of key heads, and `token_dim` those times the head dimension, not the hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import checks
from softprompt_api.formats.common_keys import PROMPT_KEYS, peft_prompt_keys
from softprompt_api.formats.content import Content, Rows
from softprompt_api.formats.safetensors_header import Shape, TensorInfo
from softprompt_api.formats.spec import (
    AdapterFormat,
    AdapterSpec,
    ModelShape,
    RawTensor,
    Role,
    canonical_json,
    check_equal,
    check_virtual_tokens,
)
from softprompt_api.formats.values import FLOAT_DTYPES

TENSOR = "prompt_embeddings"
_SIZES = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValuesSpec(AdapterSpec):
    """One tensor: `[num_virtual_tokens, num_layers * 2 * num_kv_heads * head_dim]`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def row_size(self) -> int:
        """Values of one virtual token."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def check_fits(self, model: ModelShape) -> None:
        """See AdapterSpec."""
        if model.no_key_values:
            raise AdapterInvalid(
                f"{self.kind} adapters cannot be served here: {model.no_key_values}; use an embedding kind, "
                "for example PROMPT_TUNING",
                field="config.peft_type",
            )
        check_equal("num_layers", self.num_layers, model.num_layers, field="num_layers")
        check_equal("num_kv_heads", self.num_kv_heads, model.num_kv_heads, field="num_attention_heads")
        check_equal("head_dim", self.head_dim, model.head_dim, field="token_dim")
        check_virtual_tokens(self.num_virtual_tokens, model)

    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:  # noqa: ARG002
        """See AdapterSpec."""
        return {TENSOR: (self.num_virtual_tokens, self.row_size)}

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:  # noqa: ARG002
        """See AdapterSpec."""
        return {
            **peft_prompt_keys(self.num_virtual_tokens, self.num_kv_heads * self.head_dim),
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_kv_heads,
        }

    def read(self, tensors: Mapping[str, RawTensor], *, task: int | None, dtype: str) -> Content:  # noqa: ARG002
        """See AdapterSpec."""
        tensor = tensors[TENSOR]
        return Rows(
            data=tensor.data,
            dtype=FLOAT_DTYPES[tensor.info.dtype],
            num_virtual_tokens=self.num_virtual_tokens,
            row_size=self.row_size,
            are_key_values=True,
        )


def key_values_format(kind: str, keys: Mapping[str, checks.Check]) -> AdapterFormat:
    """The format of a kind that gives keys and values, with these config keys beside the common ones."""

    def spec(config: Mapping[str, Any]) -> AdapterSpec:
        checks.require(config, *_SIZES)
        num_virtual_tokens, token_dim, num_layers, num_kv_heads = (config[key] for key in _SIZES)
        if token_dim % num_kv_heads:
            checks.unsupported("token_dim", token_dim, f"multiples of num_attention_heads, {num_kv_heads}")
        head_dim = token_dim // num_kv_heads
        return KeyValuesSpec(
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            canonical_config=canonical_json(
                kind=kind,
                num_virtual_tokens=num_virtual_tokens,
                num_layers=num_layers,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
            ),
        )

    return AdapterFormat(
        kind=kind, role=Role.KEY_VALUES, keys=MappingProxyType({**PROMPT_KEYS, **keys}), spec=spec
    )
