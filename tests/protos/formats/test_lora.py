"""LORA: ranks and scales as PEFT has them, from the config and the names of the tensors."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import (
    AdapterVerifier,
    Lora,
    ModelShape,
    parse_config,
    patterns,
    read_adapter,
    read_folder,
)
from softprompt_api.formats.kinds import lora

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SERVED = ["LoRA", "LoRA, rank-stabilised", "LoRA, patterns", "LoRA, all at once"]


def config(**changes: object) -> str:
    return json.dumps({**PLAIN, **changes})


SPEC = parse_config(config())


def tensors(**others: np.ndarray) -> dict[str, np.ndarray]:
    """One module of rank 4, and others by their names behind the module's, with "__" for "."."""
    random = np.random.default_rng(0)
    whole = {
        "lora_A__weight": random.normal(size=(4, 32)).astype(np.float32),
        "lora_B__weight": random.normal(size=(16, 4)).astype(np.float32),
        **others,
    }
    return {f"{Q}.{name.replace('__', '.')}": tensor for name, tensor in whole.items()}


def verify(data: bytes, spec: Any = SPEC, *, piece_bytes: int = 2**30, **model: object):
    verifier = AdapterVerifier(spec, size_bytes=len(data), model=ModelShape(**model))
    for start in range(0, len(data), piece_bytes):
        verifier.feed(data[start : start + piece_bytes])
    return verifier.finish()


@pytest.mark.parametrize("name", [*SERVED, "LoRA, fresh", "LoRA, orthogonal"])
def test_what_peft_writes_is_accepted(peft_folders, name):
    spec = parse_config(read_folder(peft_folders[name]).config_json)
    assert (spec.kind, spec.num_virtual_tokens, spec.hidden_size, spec.num_tasks) == ("LORA", 0, 0, 0)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("piece_bytes", [999, 2**30])
def test_every_module_has_pefts_own_rank_scale_and_matrices(peft_folders, name, piece_bytes):
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, peft_folders[name])
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }

    files = read_folder(peft_folders[name])
    spec, data = parse_config(files.config_json), files.tensors_path.read_bytes()
    verified = verify(data, spec, piece_bytes=piece_bytes)
    lora = read_adapter(spec, data)
    assert isinstance(lora, Lora)
    assert [module.name for module in lora.modules] == sorted(layers)
    assert verified.rank == max(module.rank for module in lora.modules)
    stored = load_file(files.tensors_path)
    for module in lora.modules:
        layer = layers[module.name]
        assert (module.rank, module.dtype) == (layer.r["default"], "float32")
        assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-15)
        assert (module.in_features, module.out_features) == (layer.in_features, layer.out_features)
        assert module.a == stored[f"base_model.model.{module.name}.lora_A.weight"].tobytes()
        assert module.b == stored[f"base_model.model.{module.name}.lora_B.weight"].tobytes()


def test_the_folders_have_many_ranks_and_scales(peft_folders):
    files = read_folder(peft_folders["LoRA, patterns"])
    lora = read_adapter(parse_config(files.config_json), files.tensors_path.read_bytes())
    assert len({module.rank for module in lora.modules}) == 4
    assert len({module.scale for module in lora.modules}) >= 6


def test_patterns_are_prepared_and_matched_once_for_each_file(peft_folders, monkeypatch):
    files = read_folder(peft_folders["LoRA, patterns"])
    prepared, matched = [], []
    matcher, values_of = patterns._Matcher, lora.values_of
    patterns._matcher.cache_clear()
    monkeypatch.setattr(patterns, "_Matcher", lambda found: prepared.append(found) or matcher(found))
    monkeypatch.setattr(lora, "values_of", lambda *arguments: matched.append(1) or values_of(*arguments))
    spec = parse_config(files.config_json)
    verify(files.tensors_path.read_bytes(), spec, piece_bytes=1000)
    assert len(prepared) == 2
    assert set(prepared) == {spec.rank_pattern, spec.alpha_pattern}
    assert len(matched) == 1


def test_an_untrained_lora_does_nothing_and_is_refused(peft_folders):
    files = read_folder(peft_folders["LoRA, fresh"])
    with pytest.raises(AdapterInvalid, match=r"lora_B.weight' is all zeros"):
        verify(files.tensors_path.read_bytes(), parse_config(files.config_json))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("DoRA", "config.use_dora"),
        ("PiSSA", "config.init_lora_weights"),
        ("LoRA with trained tokens", "config.trainable_token_indices"),
        ("LoRA with a trained head", "config.modules_to_save"),
        ("LoRA on the head", "tensors.base_model.model.lm_head"),
        ("LoRA on embeddings", "tensors.base_model.model.model.embed_tokens"),
    ],
)
def test_what_peft_writes_and_nobody_serves_is_refused_by_name(peft_folders, name, field):
    files = read_folder(peft_folders[name])
    with pytest.raises(AdapterInvalid) as refused:
        verify(files.tensors_path.read_bytes(), parse_config(files.config_json))
    assert refused.value.field.startswith(field)
    assert "supported" in refused.value.message or "without trained modules" in refused.value.message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({"r": bad}, "r") for bad in (0, -1, None, True, "4", 4.0)),
        *(({"lora_alpha": bad}, "lora_alpha") for bad in (0, 0.0, None, True, "8", 1e300)),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_rslora": "yes"}, "use_rslora"),
        *(
            ({"init_lora_weights": init}, "init_lora_weights")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "EVA", ["pissa"], {})
        ),
        *(
            ({key: filled}, key)
            for key, filled in {
                "use_dora": True,
                "alora_invocation_tokens": [1, 2],
                "lora_bias": True,
                "modules_to_save": ["lm_head"],
                "target_parameters": ["experts.gate_up_proj"],
                "layer_replication": [[0, 4]],
                "trainable_token_indices": [1],
                "use_qalora": True,
                "use_bdlora": {"nblocks": 2},
                "loftq_config": {"loftq_bits": 4},
                "arrow_config": {"top_k": 3},
                "kasa_config": {"a": 1},
                "monteclora_config": {"a": 1},
                "velora_config": {"scale": 1.0},
                "auto_mapping": {"parent_library": "os"},
                "megatron_config": {"a": 1},
                "megatron_core": "os",
                "num_virtual_tokens": 5,
            }.items()
        ),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.q_proj"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj"),
        ({"alpha_pattern": {str(number): 1 for number in range(1025)}}, "alpha_pattern"),
        *(
            ({"alpha_pattern": {pattern: 1}}, "alpha_pattern")
            for pattern in (
                "", "(a+)+", ".*q_proj", "q_proj|", "(q|v)_proj", r"layers\.\d+", "a{1000}", "[z-a]", "(?=a)",
                "a\nb", r"\1", "a^b", "é",
            )
        ),
    ],
)  # fmt: skip
def test_other_configs_are_refused_naming_the_key(changes, field):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(config(**changes))
    assert refused.value.field == f"config.{field}"
    assert refused.value.message.isascii()


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*(q|v)_proj"},
        {"target_modules": None, "exclude_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": True, "corda_config": {"cache_file": "/etc/passwd"}},
        {"megatron_core": "megatron.core", "megatron_config": None, "qalora_group_size": 16},
        {"fan_in_fan_out": True, "lora_dropout": 0.1, "use_rslora": None, "rank_pattern": None},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "mica"},
        {"a_future_feature": None},
    ],
)
def test_how_it_was_trained_changes_nothing(changes):
    assert parse_config(config(**changes)) == SPEC


def test_only_what_changes_the_maths_is_canonical():
    texts = {
        parse_config(config(**changes)).canonical_config
        for changes in (
            {},
            {"r": 8},
            {"lora_alpha": 16},
            {"use_rslora": True},
            {"rank_pattern": {"a": 1}},
            {"alpha_pattern": {"a": 1}},
            {"alpha_pattern": {"a": 1, "b": 2}},
            {"alpha_pattern": {"b": 2, "a": 1}},
        )
    }
    assert len(texts) == 8


BROKEN = {
    "no tensors": ({}, "tensors"),
    "a pair without B": ({f"{Q}.lora_A.weight": tensors()[f"{Q}.lora_A.weight"]}, f"tensors.{Q}.lora_B.weight"),
    "a pair without A": ({f"{Q}.lora_B.weight": tensors()[f"{Q}.lora_B.weight"]}, f"tensors.{Q}.lora_A.weight"),
    "another rank than the config's": (tensors(lora_A__weight=np.ones((8, 32), np.float32)), "tensors."),
    "ranks that do not agree": (tensors(lora_B__weight=np.ones((16, 5), np.float32)), "tensors."),
    "a flat matrix": (tensors(lora_A__weight=np.ones(128, np.float32)), "tensors."),
    "a matrix without rows": (tensors(lora_B__weight=np.ones((0, 4), np.float32)), "tensors."),
    "a pair of two dtypes": (tensors(lora_A__weight=np.ones((4, 32), np.float16)), "tensors."),
    "integers": (tensors(lora_A__weight=np.ones((4, 32), np.int32)), "tensors."),
    "NaN": (tensors(lora_A__weight=np.full((4, 32), np.nan, np.float32)), "tensors."),
    "zeros": (tensors(lora_B__weight=np.zeros((16, 4), np.float32)), "tensors."),
    "a bias": (tensors(lora_B__bias=np.ones(16, np.float32)), "tensors."),
    "a magnitude": (tensors(lora_magnitude_vector=np.ones(16, np.float32)), "tensors."),
    "an embedding's": (tensors(lora_embedding_A=np.ones((4, 9), np.float32)), "tensors."),
    "the weight itself": (tensors(base_layer__weight=np.ones((16, 32), np.float32)), "tensors."),
    "another prefix": ({"model.q_proj.lora_A.weight": np.ones((4, 8), np.float32)}, "tensors.model.q_proj"),
    "a strange name": ({"base_model.model.a b.lora_A.weight": np.ones((4, 8), np.float32)}, "tensors.base"),
    "the head": ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 8), np.float32)}, "tensors.base"),
}


@pytest.mark.parametrize(("broken", "field"), BROKEN.values(), ids=BROKEN)
def test_files_that_are_no_plain_lora_are_refused_naming_the_tensor(broken, field):
    with pytest.raises(AdapterInvalid) as refused:
        verify(save(broken))
    assert refused.value.field.startswith(field)
    assert len(refused.value.message) < 400


def test_a_rank_above_the_limit_is_refused_with_both():
    spec = parse_config(config(r=65))
    whole = {
        f"{Q}.lora_A.weight": np.ones((65, 32), np.float32),
        f"{Q}.lora_B.weight": np.ones((16, 65), np.float32),
    }
    with pytest.raises(AdapterInvalid, match="rank 65; at most 64") as refused:
        verify(save(whole), spec)
    assert refused.value.field == "config.r"
    assert verify(save(whole), spec, max_lora_rank=65).rank == 65


def test_pairs_may_differ_in_dtype_from_other_pairs():
    other = Q.replace("q_proj", "v_proj")
    half = {name.replace(Q, other): tensor.astype(np.float16) for name, tensor in tensors().items()}
    data = save({**tensors(), **half})
    spec = parse_config(config(target_modules=["q_proj", "v_proj"]))
    assert verify(data, spec).tensor_dtype == "F16, F32"
    assert [module.dtype for module in read_adapter(spec, data).modules] == ["float32", "float16"]


def test_a_file_with_modules_that_the_config_does_not_mean_is_refused():
    other = Q.replace("q_proj", "v_proj")
    data = save({**tensors(), **{name.replace(Q, other): tensor for name, tensor in tensors().items()}})
    with pytest.raises(AdapterInvalid, match="v_proj") as refused:
        verify(data)
    assert refused.value.field == "config.target_modules"


def test_equal_alphas_have_one_digest_however_they_are_spelled():
    spellings = [{"lora_alpha": 8}, {"lora_alpha": 8.0}]
    assert len({parse_config(config(**one)).canonical_config for one in spellings}) == 1
    patterns_of = [{"alpha_pattern": {"q_proj": alpha}} for alpha in (4, 4.0)]
    assert len({parse_config(config(**one)).canonical_config for one in patterns_of}) == 1
    assert parse_config(config(lora_alpha=8.5)).canonical_config != SPEC.canonical_config
