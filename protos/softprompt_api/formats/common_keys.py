"""The config keys that PEFT writes for many kinds."""

from collections.abc import Mapping

from softprompt_api.formats import checks

_NOT_PLAIN = (
    "which an adapter for a causal language model never needs; train with task_type 'CAUSAL_LM', or set it to "
    "null where the adapter was trained for such a model"
)

# Of every kind. The dangerous ones among them must hold PEFT's default.
GENERAL_KEYS: Mapping[str, checks.Check] = {
    "task_type": checks.one_of("CAUSAL_LM", None),
    "inference_mode": checks.flag,
    "base_model_name_or_path": checks.text,
    "peft_version": checks.text,
    "revision": checks.text,
    "auto_mapping": checks.unused(_NOT_PLAIN),
    "modules_to_save": checks.unused("but adapters are served without trained modules of the model"),
    "megatron_config": checks.unused("but Megatron is not supported"),
    "megatron_core": checks.unused("but Megatron is not supported", default="megatron.core"),
}

# Of every kind that is made of virtual tokens.
PROMPT_KEYS: Mapping[str, checks.Check] = {
    **GENERAL_KEYS,
    "num_virtual_tokens": checks.size,
    "token_dim": checks.size,
    "num_transformer_submodules": checks.one_of(1, None),
    "num_attention_heads": checks.count,
    "num_layers": checks.count,
}

# What PEFT writes of how a prompt was initialised.
INIT_KEYS: Mapping[str, checks.Check] = {
    "prompt_tuning_init": checks.text,
    "prompt_tuning_init_text": checks.text,
    "tokenizer_name_or_path": checks.text,
    "tokenizer_kwargs": checks.unused("but an adapter cannot ask for a tokenizer"),
}


def peft_prompt_keys(num_virtual_tokens: int, token_dim: int) -> dict[str, object]:
    """What PEFT must be told of every kind that is made of virtual tokens."""
    return {
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,
        "token_dim": token_dim,
    }
