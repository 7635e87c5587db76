"""PEFT PROMPT_TUNING: one trained row per virtual token."""

from softprompt_api.formats import checks
from softprompt_api.formats.embedding import embedding_format
from softprompt_api.formats.spec import AdapterKind

FORMAT = embedding_format(
    AdapterKind.PROMPT_TUNING,
    {
        "prompt_tuning_init": checks.text,
        "prompt_tuning_init_text": checks.text,
        "tokenizer_name_or_path": checks.text,
        "tokenizer_kwargs": checks.unused("is filled, but an adapter cannot ask for a tokenizer; remove it"),
    },
)
