"""An adapter as PEFT may read it: its checked tensors, and a config made anew from what it was parsed into.

PEFT never sees a config that somebody uploaded: keys of those can name modules to import, files and repositories.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompt_api.formats import CONFIG_FILE, TENSORS_FILE, AdapterSpec, Lora, read_adapter
from softprompt_api.formats.key_values import KeyValuesSpec
from softprompt_api.formats.lora import LoraSpec
from softprompt_api.formats.multitask_prompt_tuning import MultitaskSpec
from softprompt_api.formats.spec import AdapterKind


def write_folder(folder: Path, spec: AdapterSpec, tensors: bytes) -> None:
    """Write an adapter, whose tensor file an AdapterVerifier passed, into a folder of one's own."""
    (folder / TENSORS_FILE).write_bytes(tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(make_config(spec, tensors)), encoding="utf-8")


def make_config(spec: AdapterSpec, tensors: bytes) -> dict[str, Any]:
    """The least config with which PEFT computes what the spec says."""
    config: dict[str, Any] = {
        "peft_type": spec.kind.value,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    if isinstance(spec, LoraSpec):
        return {**config, **_lora(spec, _modules(spec, tensors))}
    config |= {"num_virtual_tokens": spec.num_virtual_tokens, "num_transformer_submodules": 1}
    if isinstance(spec, KeyValuesSpec):
        return {
            **config,
            "token_dim": spec.num_kv_heads * spec.head_dim,
            "num_layers": spec.num_layers,
            "num_attention_heads": spec.num_kv_heads,
        }
    config["token_dim"] = spec.hidden_size
    if isinstance(spec, MultitaskSpec):
        config |= {"num_tasks": spec.num_tasks, "num_ranks": spec.num_ranks}
    if spec.kind is AdapterKind.CPT:
        # PEFT counts virtual tokens by these; it embeds none of them once the prompt is trained.
        config["cpt_token_ids"] = [0] * spec.num_virtual_tokens
    return config


def _lora(spec: LoraSpec, modules: Sequence[str]) -> dict[str, Any]:
    return {
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "target_modules": list(modules),
        "bias": "none",
    }


def _modules(spec: LoraSpec, tensors: bytes) -> list[str]:
    """Full names of the modules that have matrices."""
    content = read_adapter(spec, tensors)
    assert isinstance(content, Lora)
    return [module.name for module in content.modules]
