"""An adapter as PEFT may read it: its checked tensors, and a config made anew from what it was parsed into.

PEFT never sees a config that somebody uploaded: keys of those can name modules to import, files and repositories.
"""

import json
from pathlib import Path
from typing import Any

from softprompt_api.formats import CONFIG_FILE, TENSORS_FILE, AdapterSpec, read_infos


def write_folder(folder: Path, spec: AdapterSpec, tensors: bytes) -> None:
    """Write an adapter, whose tensor file an AdapterVerifier passed, into a folder of one's own."""
    (folder / TENSORS_FILE).write_bytes(tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(make_config(spec, tensors)), encoding="utf-8")


def make_config(spec: AdapterSpec, tensors: bytes) -> dict[str, Any]:
    """The least config with which PEFT computes what the spec says."""
    return {
        "peft_type": spec.kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": None,
        **spec.peft_keys(read_infos(spec, tensors)),
    }
