"""PEFT PREFIX_TUNING: keys and values that PEFT saves after its projection, which is not needed any more."""

from softprompt_api.formats import checks
from softprompt_api.formats.key_values import key_values_format

FORMAT = key_values_format(
    "PREFIX_TUNING",
    {
        "encoder_hidden_size": checks.count,
        "prefix_projection": checks.flag,
        "init_weights": checks.one_of("zero", None),
    },
)
