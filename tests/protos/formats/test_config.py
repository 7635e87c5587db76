"""Configs: what PEFT writes is accepted, what would change the maths or reach out is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import MAX_CONFIG_BYTES, parse_config, read_folder

PLAIN = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": 32}


def config(**changes: object) -> str:
    return json.dumps({**PLAIN, **changes})


@pytest.mark.parametrize(
    ("name", "kind", "num_virtual_tokens"),
    [
        ("prompt tuning", "PROMPT_TUNING", 5),
        ("prompt tuning from vocabulary", "PROMPT_TUNING", 5),
        ("prompt tuning from text", "PROMPT_TUNING", 5),
        ("p-tuning, MLP", "P_TUNING", 5),
        ("p-tuning, LSTM", "P_TUNING", 5),
        ("CPT", "CPT", 4),
        ("multitask", "MULTITASK_PROMPT_TUNING", 5),
        ("multitask, from text", "MULTITASK_PROMPT_TUNING", 5),
    ],
)
def test_what_peft_writes_is_accepted(peft_folders, name, kind, num_virtual_tokens):
    spec = parse_config(read_folder(peft_folders[name]).config_json)
    assert (spec.kind, spec.num_virtual_tokens, spec.hidden_size) == (kind, num_virtual_tokens, 32)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("IA3", "config.peft_type"),
        ("prompt tuning, tokenizer_kwargs", "config.tokenizer_kwargs"),
    ],
)
def test_what_peft_writes_and_nobody_serves_is_refused_by_name(peft_folders, name, field):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(read_folder(peft_folders[name]).config_json)
    assert refused.value.field == field
    if field == "config.peft_type":
        assert (
            "supported: CARTRIDGE, CPT, LORA, MULTITASK_PROMPT_TUNING, PREFIX_TUNING, PROMPT_TUNING, P_TUNING"
            in refused.value.message
        )


def test_only_what_changes_the_maths_is_canonical():
    plain = parse_config(config())
    assert plain == parse_config(config(base_model_name_or_path="../../x", prompt_tuning_init_text="hello"))
    assert plain.canonical_config == '{"hidden_size":32,"kind":"PROMPT_TUNING","num_virtual_tokens":5}'
    assert plain.canonical_config != parse_config(config(num_virtual_tokens=6)).canonical_config
    assert plain.canonical_config != parse_config(config(peft_type="P_TUNING")).canonical_config


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": None},
        {"modules_to_save": None},
        {"modules_to_save": []},
        {"tokenizer_kwargs": {}},
        {"megatron_core": "megatron.core", "megatron_config": None},
        {"a_future_feature": None},
        {"a_future_feature": False},
        {"a_future_feature": {}},
        {"num_transformer_submodules": None},
        {"task_type": None},
        {"num_layers": 30, "num_attention_heads": 9},
    ],
)
def test_features_that_are_off_are_accepted(changes):
    assert parse_config(config(**changes)) == parse_config(config())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "os"}}, "auto_mapping"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
        ({"megatron_core": "os"}, "megatron_core"),
        ({"megatron_core": "megatron.core", "megatron_config": {"a": 1}}, "megatron_config"),
        ({"_attn_implementation_internal": "org/kernel"}, "_attn_implementation_internal"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt_tuning_init_state_dict_path": "/etc/passwd"}, "prompt_tuning_init_state_dict_path"),
        ({"use_dora": True}, "use_dora"),
        ({"prefix_projection": True}, "prefix_projection"),
        ({"zero": 0}, "zero"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"num_transformer_submodules": True}, "num_transformer_submodules"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type"),
        ({"peft_type": None}, "peft_type"),
        ({"peft_type": 1}, "peft_type"),
        ({"peft_type": "prompt_tuning"}, "peft_type"),
        ({"peft_type": "ADAPTION_PROMPT"}, "peft_type"),
        *(
            ({"num_virtual_tokens": bad}, "num_virtual_tokens")
            for bad in (0, -1, 2**31, True, "5", 5.0, None, [5])
        ),
        *(({"token_dim": bad}, "token_dim") for bad in (0, True, "32", None)),
        ({"num_layers": -1}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"inference_mode": 1}, "inference_mode"),
        ({"base_model_name_or_path": {"a": 1}}, "base_model_name_or_path"),
        ({"peft_type": "CPT", "cpt_token_ids": "1,2"}, "cpt_token_ids"),
        ({"peft_type": "CPT", "cpt_mask": [True]}, "cpt_mask"),
        ({"peft_type": "P_TUNING", "encoder_dropout": "0"}, "encoder_dropout"),
        ({"line\nbreak": 1}, "line\\nbreak"),
    ],
)
def test_everything_else_is_refused_naming_the_key(changes, field):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(config(**changes))
    assert refused.value.field == f"config.{field}"
    assert refused.value.message.isascii()
    assert "\n" not in refused.value.message


def test_a_missing_size_is_refused():
    for key in ("num_virtual_tokens", "token_dim"):
        with pytest.raises(AdapterInvalid) as refused:
            parse_config(json.dumps({name: value for name, value in PLAIN.items() if name != key}))
        assert refused.value.field == f"config.{key}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("{} {}", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('{"token_dim": 1, "token_dim": 2}', "has the key 'token_dim' twice"),
        ('{"x": {"a": 1, "a": 2}}', "has the key 'a' twice"),
        ('{"token_dim": NaN}', "not finite"),
        ('{"token_dim": -Infinity}', "not finite"),
        ('{"token_dim": 1e999}', "not finite"),
        ('{"token_dim": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 500_000, "is nested deeper than 64"),
        ('{"a":' * 100_000, "is nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "is nested deeper than 64"),
        ("\ufeff{}", "is not JSON"),
        ('{"a": "\x00"}', "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b'{"\xff": 1}', "is not UTF-8"),
        (" " * MAX_CONFIG_BYTES + "{}", "at most"),
        ("é" * (MAX_CONFIG_BYTES // 2 + 1), "at most"),
    ],
    ids=range(20),
)
def test_what_is_no_plain_json_object_is_refused(text, problem):
    with pytest.raises(AdapterInvalid, match=problem) as refused:
        parse_config(text)
    assert refused.value.field == "config_json"


def test_many_duplicate_keys_are_refused_quickly():
    keys = ",".join(f'"k{number}":1' for number in range(50_000))
    with pytest.raises(AdapterInvalid, match="twice"):
        parse_config("{" + keys + ',"k0":1}')


def test_nothing_in_a_config_of_any_kind_reaches_out():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("watch_configs.py"))],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["seen"] == []
    assert report["sees"], "the watcher is blind"
    assert report["num_refused"] > report["num_texts"] // 2
