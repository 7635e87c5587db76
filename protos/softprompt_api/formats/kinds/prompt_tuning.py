"""PEFT PROMPT_TUNING: one trained row per virtual token."""

from softprompt_api.formats.common_keys import INIT_KEYS
from softprompt_api.formats.embedding import embedding_format

FORMAT = embedding_format("PROMPT_TUNING", INIT_KEYS)
