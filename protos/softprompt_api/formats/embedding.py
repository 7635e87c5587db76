"""What all embedding kinds share: rows of the hidden size, put in front of the token embeddings."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from softprompt_api.formats import checks
from softprompt_api.formats.spec import AdapterFormat, AdapterKind, AdapterSpec, Shape

TENSOR = "prompt_embeddings"

_NOT_PLAIN = "is filled, which a prompt for a causal language model never needs; train with task_type 'CAUSAL_LM'"

# Keys that PEFT writes for every prompt-learning kind, and the dangerous ones that must hold PEFT's default.
_COMMON_KEYS: Mapping[str, checks.Check] = {
    "num_virtual_tokens": checks.size,
    "token_dim": checks.size,
    "num_transformer_submodules": checks.one_of(1, None),
    "task_type": checks.one_of("CAUSAL_LM", None),
    "num_attention_heads": checks.count,
    "num_layers": checks.count,
    "inference_mode": checks.flag,
    "base_model_name_or_path": checks.text,
    "peft_version": checks.text,
    "revision": checks.text,
    "auto_mapping": checks.unused(_NOT_PLAIN),
    "modules_to_save": checks.unused(
        "is filled, but a soft prompt is served without trained modules of the model"
    ),
    "megatron_config": checks.unused("is filled, but Megatron is not supported"),
    "megatron_core": checks.unused("must be 'megatron.core' or null", default="megatron.core"),
}


def embedding_format(kind: AdapterKind, keys: Mapping[str, checks.Check]) -> AdapterFormat:
    """The format of an embedding kind with these config keys beside the common ones."""

    def spec(config: Mapping[str, Any]) -> AdapterSpec:
        for key in ("num_virtual_tokens", "token_dim"):
            checks.size(key, config.get(key))
        canonical = {
            "hidden_size": config["token_dim"],
            "kind": kind.value,
            "num_virtual_tokens": config["num_virtual_tokens"],
        }
        return AdapterSpec(
            kind=kind,
            num_virtual_tokens=config["num_virtual_tokens"],
            hidden_size=config["token_dim"],
            canonical_config=json.dumps(canonical, sort_keys=True, separators=(",", ":")),
        )

    all_keys = MappingProxyType({**_COMMON_KEYS, **keys})
    return AdapterFormat(kind=kind, keys=all_keys, spec=spec, tensors=_tensors)


def _tensors(spec: AdapterSpec) -> Mapping[str, Shape]:
    return {TENSOR: (spec.num_virtual_tokens, spec.hidden_size)}
