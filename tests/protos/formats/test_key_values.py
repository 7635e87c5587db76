"""PREFIX_TUNING and CARTRIDGE: keys and values, as PEFT saves them."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import (
    AdapterVerifier,
    ModelShape,
    parse_config,
    read_adapter,
    read_folder,
)

PLAIN = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 5,
    "token_dim": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
}
# The tiny model of the PEFT folders: its hidden size, 32, is nowhere in these configs.
MODEL = ModelShape(
    hidden_size=32, num_layers=2, num_kv_heads=2, head_dim=8, max_virtual_tokens=5, dtype="bfloat16"
)
KINDS = [
    ("prefix tuning", "PREFIX_TUNING"),
    ("prefix tuning, projected", "PREFIX_TUNING"),
    ("cartridge", "CARTRIDGE"),
]


def config(**changes: object) -> str:
    return json.dumps({**PLAIN, **changes})


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_what_peft_saves_is_verified_and_read_back_exactly(peft_folders, name, kind):
    files = read_folder(peft_folders[name])
    spec, data = parse_config(files.config_json), files.tensors_path.read_bytes()
    assert (spec.kind, spec.num_virtual_tokens, spec.hidden_size, spec.num_tasks) == (kind, 5, 0, 0)
    verifier = AdapterVerifier(spec, size_bytes=len(data), model=MODEL)
    verifier.feed(data)
    assert (verifier.finish().tensor_dtype, verifier.finish().rank) == ("F32", 0)
    rows = read_adapter(spec, data)
    assert rows.are_key_values
    assert (rows.dtype, rows.num_virtual_tokens, rows.row_size) == ("float32", 5, 2 * 2 * 2 * 8)
    from safetensors import safe_open

    with safe_open(files.tensors_path, "np") as opened:
        assert rows.data == opened.get_tensor("prompt_embeddings").tobytes()


def test_one_projected_and_one_not_are_told_apart_by_their_tensors_alone():
    assert parse_config(config(prefix_projection=True)) == parse_config(config(encoder_hidden_size=99))
    digests = {
        parse_config(config(**changes)).canonical_config
        for changes in (
            {},
            {"peft_type": "CARTRIDGE"},
            {"num_virtual_tokens": 6},
            {"num_layers": 1},
            {"token_dim": 32},
            {"token_dim": 32, "num_attention_heads": 4},
        )
    }
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(
            ({key: bad}, key)
            for key in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
            for bad in (0, None, True, "2", -1)
        ),
        ({"token_dim": 15}, "token_dim"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ({"prefix_projection": "yes"}, "prefix_projection"),
        ({"init_weights": "ones"}, "init_weights"),
        ({"num_frozen_tokens": 1}, "num_frozen_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": -1}, "num_frozen_tokens"),
        ({"peft_type": "CARTRIDGE", "prefix_projection": True}, "prefix_projection"),
    ],
)
def test_other_configs_are_refused_naming_the_key(changes, field):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(config(**changes))
    assert refused.value.field == f"config.{field}"


@pytest.mark.parametrize("missing", ["num_layers", "num_attention_heads"])
def test_a_missing_size_is_refused(missing):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(json.dumps({key: value for key, value in PLAIN.items() if key != missing}))
    assert refused.value.field == f"config.{missing}"


@pytest.mark.parametrize(
    ("shape", "field", "message"),
    [
        ({"num_layers": 3}, "num_layers", "num_layers 2, the base model has 3"),
        ({"num_kv_heads": 4}, "num_attention_heads", "num_kv_heads 2, the base model has 4"),
        ({"head_dim": 16}, "token_dim", "head_dim 8, the base model has 16"),
        ({"max_virtual_tokens": 4}, "num_virtual_tokens", "5 virtual tokens; at most 4"),
        ({"no_key_values": "Gemma2ForCausalLM has sliding-window layers"}, "peft_type", "Gemma2ForCausalLM has"),
    ],
)
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_a_model_of_another_shape_is_refused(kind, shape: dict[str, Any], field, message):
    with pytest.raises(AdapterInvalid, match=message) as refused:
        AdapterVerifier(parse_config(config(peft_type=kind)), size_bytes=1, model=ModelShape(**shape))
    assert refused.value.field == f"config.{field}"


@pytest.mark.parametrize("shape", [(5, 32), (4, 64), (6, 64), (64, 5), (5, 2, 2, 16)])
def test_a_tensor_of_another_shape_is_refused(shape):
    data = save({"prompt_embeddings": np.ones(shape, np.float32)})
    verifier = AdapterVerifier(parse_config(config()), size_bytes=len(data))
    with pytest.raises(AdapterInvalid, match=r"the config says \[5, 64\]") as refused:
        verifier.feed(data)
    assert refused.value.field == "tensors.prompt_embeddings"
