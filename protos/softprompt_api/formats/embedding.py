"""What all embedding kinds share: rows of the hidden size, put in front of the token embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec(AdapterSpec):
    """One tensor: `[num_virtual_tokens, hidden_size]`."""

    def check_fits(self, model: ModelShape) -> None:
        """See AdapterSpec."""
        check_equal("hidden size", self.hidden_size, model.hidden_size, field="token_dim")
        check_virtual_tokens(self.num_virtual_tokens, model)

    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:  # noqa: ARG002
        """See AdapterSpec."""
        return {TENSOR: (self.num_virtual_tokens, self.hidden_size)}

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:  # noqa: ARG002
        """See AdapterSpec."""
        return peft_prompt_keys(self.num_virtual_tokens, self.hidden_size)

    def embeddings(self) -> str:
        """See AdapterSpec."""
        return TENSOR

    def read(self, tensors: Mapping[str, RawTensor], *, task: int | None, dtype: str) -> Content:  # noqa: ARG002
        """See AdapterSpec."""
        tensor = tensors[TENSOR]
        return Rows(
            data=bytes(tensor.data),
            dtype=FLOAT_DTYPES[tensor.info.dtype],
            num_virtual_tokens=self.num_virtual_tokens,
            row_size=self.hidden_size,
        )


def embedding_format(
    kind: str, keys: Mapping[str, checks.Check], spec_class: type[EmbeddingSpec] = EmbeddingSpec
) -> AdapterFormat:
    """The format of an embedding kind with these config keys beside the common ones."""

    def spec(config: Mapping[str, Any]) -> AdapterSpec:
        checks.require(config, "num_virtual_tokens", "token_dim")
        num_virtual_tokens, hidden_size = config["num_virtual_tokens"], config["token_dim"]
        return spec_class(
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            hidden_size=hidden_size,
            canonical_config=canonical_json(
                kind=kind, num_virtual_tokens=num_virtual_tokens, hidden_size=hidden_size
            ),
        )

    return AdapterFormat(
        kind=kind, role=Role.EMBEDDINGS, keys=MappingProxyType({**PROMPT_KEYS, **keys}), spec=spec
    )
