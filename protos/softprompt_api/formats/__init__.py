"""Adapter files as PEFT writes them: read, checked and named, without PEFT and without torch.

`adapter_config.json` becomes an AdapterSpec through an allowlist of keys; `adapter_model.safetensors` is checked
while it streams past. Nothing in either file can cause an import, an open or a connection.
"""

from softprompt_api.formats.config import MAX_CONFIG_BYTES, parse_config
from softprompt_api.formats.content import Content, Lora, LoraModule, Rows
from softprompt_api.formats.folder import CONFIG_FILE, TENSORS_FILE, AdapterFiles, read_folder
from softprompt_api.formats.spec import DEFAULT_MAX_LORA_RANK, AdapterSpec, ModelShape, Role
from softprompt_api.formats.verify import (
    AdapterVerifier,
    VerifiedAdapter,
    adapter_digest,
    read_adapter,
    read_infos,
)

__all__ = [
    "CONFIG_FILE",
    "DEFAULT_MAX_LORA_RANK",
    "MAX_CONFIG_BYTES",
    "TENSORS_FILE",
    "AdapterFiles",
    "AdapterSpec",
    "AdapterVerifier",
    "Content",
    "Lora",
    "LoraModule",
    "ModelShape",
    "Role",
    "Rows",
    "VerifiedAdapter",
    "adapter_digest",
    "parse_config",
    "read_adapter",
    "read_folder",
    "read_infos",
]
