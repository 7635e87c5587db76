"""A tiny model with a real tokenizer, and adapters that PEFT wrote for it."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

MakeAdapter = Callable[..., Path]

# Before torch is first imported: tests share their cores with each other's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads this once, when it is first imported, and transformers imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the default model's tokenizer and chat template."""
    import torch
    from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Wide enough that greedy choices are far apart and outputs of different adapters differ.
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(seed, num_virtual_tokens, kind)` writes a PEFT folder of random values for the tiny model."""
    import torch
    from peft import (
        LoraConfig,
        MultitaskPromptTuningConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        TaskType,
        get_peft_model,
    )
    from transformers import AutoModelForCausalLM

    kinds = {
        "prompt_tuning": PromptTuningConfig,
        "prefix_tuning": PrefixTuningConfig,
        "multitask": partial(MultitaskPromptTuningConfig, num_tasks=2),
    }

    def make(seed: int, num_virtual_tokens: int = 5, kind: str = "prompt_tuning", rank: int = 4) -> Path:
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        torch.manual_seed(seed)
        if kind == "lora":
            config = LoraConfig(
                task_type=TaskType.CAUSAL_LM, r=rank, target_modules="all-linear", init_lora_weights=False
            )
        else:
            config = kinds[kind](task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters() if kind != "lora" else ():
                parameter.normal_()
        model.save_pretrained(folder)
        return folder

    return make
