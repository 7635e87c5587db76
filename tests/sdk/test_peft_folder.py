"""PEFT is given a config of our own making, and computes the same with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt.peft_folder import make_config, write_folder
from softprompt_api.formats import parse_config

MakeAdapter = Callable[..., Path]
KINDS = ["prompt_tuning", "prefix_tuning", "multitask", "lora"]


def parts(folder: Path) -> tuple[Any, bytes]:
    """The parsed config, and the tensor file."""
    text = (folder / "adapter_config.json").read_text()
    return parse_config(text), (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_same_adapter_to_us(make_adapter: MakeAdapter, tmp_path: Path, kind: str) -> None:
    spec, tensors = parts(make_adapter(60, kind=kind))
    write_folder(tmp_path, spec, tensors)
    written, bytes_ = parts(tmp_path)
    assert (written.canonical_config, bytes_) == (spec.canonical_config, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_uploaded_config_is_kept_but_what_was_parsed(make_adapter: MakeAdapter, kind: str) -> None:
    folder = make_adapter(60, kind=kind)
    spec, tensors = parts(folder)
    text = json.dumps(make_config(spec, tensors))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "evil/repo", "revision": "evil", "peft_version": "evil"}
    if kind in ("prompt_tuning", "multitask"):
        config |= {"prompt_tuning_init_text": "evil", "tokenizer_name_or_path": "evil/tokenizer"}
    other = parse_config(json.dumps(config))
    assert json.dumps(make_config(other, tensors)) == text
    assert "evil" not in text


@pytest.mark.parametrize("kind", ["P_TUNING", "CPT"])
def test_kinds_whose_files_have_the_same_tensor_stay_their_kinds(kind: str) -> None:
    spec = parse_config(json.dumps({"peft_type": kind, "num_virtual_tokens": 3, "token_dim": 8}))
    config = make_config(spec, save({"prompt_embeddings": np.ones((3, 8), np.float32)}))
    assert config["peft_type"] == kind
    assert (config.get("cpt_token_ids") == [0, 0, 0]) == (kind == "CPT")


def test_ranks_and_scales_of_modules_are_kept(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(61, kind="lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"alpha_pattern": {r"layers\.0\.self_attn.q_proj": 3}, "use_rslora": True}
    spec = parse_config(json.dumps(config))
    made = make_config(spec, (folder / "adapter_model.safetensors").read_bytes())
    assert (made["r"], made["use_rslora"], made["alpha_pattern"]) == (4, True, config["alpha_pattern"])
    assert "model.layers.1.mlp.down_proj" in made["target_modules"]
