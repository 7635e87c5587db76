"""PEFT P_TUNING: rows that PEFT saves after its encoder (MLP or LSTM), which is not needed any more."""

from softprompt_api.formats import checks
from softprompt_api.formats.embedding import embedding_format

FORMAT = embedding_format(
    "P_TUNING",
    {
        "encoder_reparameterization_type": checks.text,
        "encoder_hidden_size": checks.count,
        "encoder_num_layers": checks.count,
        "encoder_dropout": checks.number,
    },
)
