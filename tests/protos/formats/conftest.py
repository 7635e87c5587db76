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
    lora = {**causal, "r": 4, "init_lora_weights": False}
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
        "LoRA, fresh": peft.LoraConfig(**causal, r=4, target_modules=["q_proj"]),
        "LoRA": peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj"], lora_alpha=3),
        "LoRA, rank-stabilised": peft.LoraConfig(
            **lora, target_modules=r".*layers\.1\..*_proj", lora_alpha=12, use_rslora=True
        ),
        "LoRA, patterns": peft.LoraConfig(
            **lora,
            target_modules="all-linear",
            rank_pattern={"k_proj": 2, "layers.0.self_attn.q_proj": 8, r"^model.layers.\d.mlp.up_proj": 5},
            alpha_pattern={"q_proj": 6, "model.layers.0.self_attn.q_proj": 7, "o_proj|down_proj": 9},
        ),
        "LoRA, all at once": peft.LoraConfig(
            **lora,
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={r"layers\.[1-9]\.self_attn.q_proj": 16},
            alpha_pattern={"gate_proj$": 2, "proj": 5},
            exclude_modules=["v_proj"],
            layers_to_transform=None,
        ),
        "LoRA on the head": peft.LoraConfig(**lora, target_modules=["lm_head"]),
        "LoRA on embeddings": peft.LoraConfig(**lora, target_modules=["embed_tokens"]),
        "LoRA with trained tokens": peft.LoraConfig(
            **lora, target_modules=["q_proj"], trainable_token_indices=[1]
        ),
        "LoRA with a trained head": peft.LoraConfig(
            **lora, target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        "DoRA": peft.LoraConfig(**lora, target_modules=["q_proj"], use_dora=True),
        "PiSSA": peft.LoraConfig(**causal, r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
        "LoRA, orthogonal": peft.LoraConfig(
            **causal, r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"
        ),
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
