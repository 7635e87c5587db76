"""PEFT CPT (context-aware prompt tuning): rows that PEFT saves in final form, projection applied."""

from collections.abc import Mapping
from dataclasses import dataclass

from softprompt_api.formats import checks
from softprompt_api.formats.embedding import EmbeddingSpec, embedding_format
from softprompt_api.formats.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CptSpec(EmbeddingSpec):
    """Rows like those of every embedding kind, but for the config that PEFT needs."""

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:
        """See AdapterSpec."""
        # PEFT counts virtual tokens by these ids; it embeds none of them once the prompt is trained.
        return {**EmbeddingSpec.peft_keys(self, found), "cpt_token_ids": [0] * self.num_virtual_tokens}


FORMAT = embedding_format(
    "CPT",
    {
        "cpt_token_ids": checks.integers,
        "cpt_mask": checks.integers,
        "cpt_tokens_type_mask": checks.integers,
        "opt_weighted_loss_type": checks.text,
        "opt_loss_decay_factor": checks.number,
        "opt_projection_epsilon": checks.number,
        "opt_projection_format_epsilon": checks.number,
        "tokenizer_name_or_path": checks.text,
    },
    CptSpec,
)
