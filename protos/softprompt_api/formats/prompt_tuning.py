"""PEFT PROMPT_TUNING: one trained row per virtual token."""

from softprompt_api.formats.common_keys import INIT_KEYS
from softprompt_api.formats.embedding import embedding_format
from softprompt_api.formats.spec import AdapterKind

FORMAT = embedding_format(AdapterKind.PROMPT_TUNING, INIT_KEYS)
