"""FACTORED_PROMPT: rows of the hidden size that are saved as the product of two matrices of low rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt_api.formats import Content, Role, Rows, checks
from softprompt_api.formats.common_keys import PROMPT_KEYS
from softprompt_api.formats.embedding import EmbeddingSpec
from softprompt_api.formats.safetensors_header import Shape, TensorInfo
from softprompt_api.formats.spec import AdapterFormat, RawTensor, canonical_json
from softprompt_api.formats.values import as_float32, check_values


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredSpec(EmbeddingSpec):
    """Two tensors: `[num_virtual_tokens, r]` and `[r, hidden_size]`."""

    r: int

    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:
        return {"left": (self.num_virtual_tokens, self.r), "right": (self.r, self.hidden_size)}

    def read(self, tensors: Mapping[str, RawTensor], *, task: int | None, dtype: str) -> Content:
        left, right = (
            as_float32(one.data, one.info.dtype).reshape(one.info.shape)
            for one in (tensors["left"], tensors["right"])
        )
        rows = left @ right
        check_values(rows, "left @ right", dtype)
        return Rows(data=rows.tobytes(), dtype="float32", num_virtual_tokens=len(rows), row_size=self.hidden_size)

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:
        return {**EmbeddingSpec.peft_keys(self, found), "r": self.r}

    def embeddings(self) -> str:
        return ""  # no tensor has the rows whose norms would be told


def _spec(config: Mapping[str, Any]) -> FactoredSpec:
    checks.require(config, "num_virtual_tokens", "token_dim", "r")
    sizes = {
        "num_virtual_tokens": config["num_virtual_tokens"],
        "hidden_size": config["token_dim"],
        "r": config["r"],
    }
    kind = "FACTORED_PROMPT"
    return FactoredSpec(kind=kind, canonical_config=canonical_json(kind=kind, **sizes), **sizes)


FORMAT = AdapterFormat(
    kind="FACTORED_PROMPT", role=Role.EMBEDDINGS, keys={**PROMPT_KEYS, "r": checks.size}, spec=_spec
)
