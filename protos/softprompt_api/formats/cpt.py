"""PEFT CPT (context-aware prompt tuning): rows that PEFT saves in final form, projection applied."""

from softprompt_api.formats import checks
from softprompt_api.formats.embedding import embedding_format
from softprompt_api.formats.spec import AdapterKind

FORMAT = embedding_format(
    AdapterKind.CPT,
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
)
