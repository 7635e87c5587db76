"""PEFT CARTRIDGE: keys and values that were trained as such, without a projection."""

from softprompt_api.formats import checks
from softprompt_api.formats.key_values import key_values_format

FORMAT = key_values_format("CARTRIDGE", {"num_frozen_tokens": checks.count})
