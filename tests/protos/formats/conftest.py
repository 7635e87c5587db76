"""Adapters of every kind, written by PEFT itself for a tiny random model."""

import warnings
from pathlib import Path

import pytest

HIDDEN = 32


@pytest.fixture(scope="session")
def peft_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that `save_pretrained` wrote, by what is in them."""
    import peft
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("peft")
    words = {"[UNK]": 0, "is": 1, "this": 2, "tweet": 3, "negative": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(root / "tokenizer")

    causal = {"task_type": peft.TaskType.CAUSAL_LM}
    rows = {**causal, "num_virtual_tokens": 5}
    text = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "is this tweet negative",
        "tokenizer_name_or_path": str(root / "tokenizer"),
    }
    cpt = {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    configs = {
        "prompt tuning": peft.PromptTuningConfig(**rows),
        "prompt tuning from vocabulary": peft.PromptTuningConfig(**rows, prompt_tuning_init="SAMPLE_VOCAB"),
        "prompt tuning from text": peft.PromptTuningConfig(**rows, **text),
        "prompt tuning, tokenizer_kwargs": peft.PromptTuningConfig(
            **rows, **text, tokenizer_kwargs={"padding": True}
        ),
        "p-tuning, MLP": peft.PromptEncoderConfig(**rows, encoder_hidden_size=16),
        "p-tuning, LSTM": peft.PromptEncoderConfig(
            **rows, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
        ),
        "CPT": peft.CPTConfig(**causal, **cpt, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.95),
        "prefix tuning": peft.PrefixTuningConfig(**rows),
        "prefix tuning, projected": peft.PrefixTuningConfig(
            **rows, prefix_projection=True, encoder_hidden_size=16
        ),
        "cartridge": peft.CartridgeConfig(**rows),
        "multitask": peft.MultitaskPromptTuningConfig(**rows, num_tasks=3, num_ranks=2),
        "multitask, from text": peft.MultitaskPromptTuningConfig(**rows, **text, num_tasks=1),
        "IA3": peft.IA3Config(**causal, target_modules=["k_proj"], feedforward_modules=[]),
        "LoRA": peft.LoraConfig(**causal, r=4, target_modules=["q_proj"]),
    }
    for name, config in configs.items():
        torch.manual_seed(20)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=97,
            )
        )
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
            warnings.simplefilter("ignore")
            peft.get_peft_model(model, config).save_pretrained(root / name)
    return {name: root / name for name in configs}
