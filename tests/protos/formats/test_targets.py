"""The modules that a LoRA's config means are those that PEFT changes."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats.targets import targets_of

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "transformer.h.1.attn.c_attn",
    "layers.1.q_proj",
    "q_proj",
    "model.q_projection",
    "h.layers.7.blocks.1.q_proj",
    "h.1.h.2.q_proj",
    "0.1.q_proj",
    ".h.1.q_proj",
    "model.h.1",
]
CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "c_attn"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["_proj"]},
    {"target_modules": []},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": []},
    {"target_modules": ["q_proj", "v_proj", "up_proj", "c_attn"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj", "up_proj", "c_attn"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "v_proj", "up_proj", "c_attn"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 10], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers", "blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [7], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "1"], "layers_to_transform": [1, 7], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "0"},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_is_meant_is_what_peft_changes(config):
    peft_config = LoraConfig(**config)
    targets = targets_of(config)
    for module in MODULES:
        found = check_target_module_exists(peft_config, module)
        is_meant = bool(found) and not isinstance(found, _ExcludedModule)
        if is_meant:
            targets.check([module])
        else:
            with pytest.raises(AdapterInvalid):
                targets.check([module])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"target_modules": ["v_proj"]}, "target_modules"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layers_to_transform": [3]}, "layers_to_transform"),
    ],
)
def test_the_key_that_leaves_a_module_out_is_named(changes, key):
    targets = targets_of({"target_modules": ["q_proj"], **changes})
    with pytest.raises(AdapterInvalid, match=rf"^{key} in .*'model\.layers\.0\.self_attn\.q_proj'") as refused:
        targets.check(MODULES)
    assert refused.value.field == f"config.{key}"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ".*q_proj", "exclude_modules": ".*"},
        {"target_modules": None},
        {},
        {"target_modules": ["q_proj", "v_proj", "up_proj", "c_attn", "q_projection", "1"],
         "layers_to_transform": [9], "layers_pattern": "(layers|h)"},
    ],
    ids=str,
)  # fmt: skip
def test_expressions_are_not_looked_at(config):
    targets_of(config).check(MODULES)


@pytest.mark.timeout(60)
def test_as_many_patterns_as_a_config_can_hold_are_looked_at_at_once():
    patterns = [f"p{number}" for number in range(100_000)] + ["h"]
    config = {"target_modules": ["q_proj"], "layers_to_transform": [*range(2048)], "layers_pattern": patterns}
    targets_of(config).check(f"h.{number}.q_proj" for number in range(2048))
