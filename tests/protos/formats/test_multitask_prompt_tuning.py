"""MULTITASK_PROMPT_TUNING: three tensors, and a prompt of its own for each task."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import AdapterVerifier, ModelShape, parse_config, read_adapter, read_folder

SIZES = {"num_virtual_tokens": 5, "token_dim": 8, "num_tasks": 3, "num_ranks": 2}
PLAIN = {"peft_type": "MULTITASK_PROMPT_TUNING", **SIZES}
SPEC = parse_config(json.dumps(PLAIN))


def tensors(dtype: type = np.float32, **others: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "prompt_embeddings": random.normal(size=(5, 8)).astype(dtype),
        "prefix_task_cols": random.normal(size=(3, 5, 2)).astype(dtype),
        "prefix_task_rows": random.normal(size=(3, 2, 8)).astype(dtype),
        **others,
    }


def verify(data: bytes, *, piece_bytes: int = 2**30, all_tasks: bool = False, **model: object):
    verifier = AdapterVerifier(SPEC, size_bytes=len(data), model=ModelShape(**model), all_tasks=all_tasks)
    for start in range(0, len(data), piece_bytes):
        verifier.feed(data[start : start + piece_bytes])
    return verifier.finish()


@pytest.mark.parametrize(("name", "num_tasks"), [("multitask", 3), ("multitask, from text", 1)])
@pytest.mark.parametrize("piece_bytes", [1, 7, 1000, 2**20])
def test_what_peft_saves_is_verified_in_any_pieces(peft_folders, name, num_tasks, piece_bytes):
    files = read_folder(peft_folders[name])
    spec, data = parse_config(files.config_json), files.tensors_path.read_bytes()
    assert (spec.num_tasks, spec.hidden_size) == (num_tasks, 32)
    verifier = AdapterVerifier(spec, size_bytes=len(data), model=ModelShape(hidden_size=32, dtype="float16"))
    for start in range(0, len(data), piece_bytes):
        verifier.feed(data[start : start + piece_bytes])
    assert verifier.finish().tensor_dtype == "F32"


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_tasks_prompt_is_the_shared_one_times_its_own_product(peft_folders, task):
    files = read_folder(peft_folders["multitask"])
    rows = read_adapter(
        parse_config(files.config_json), files.tensors_path.read_bytes(), task=task, dtype="float32"
    )
    with safe_open(files.tensors_path, "pt") as opened:
        shared, cols, factors = (
            opened.get_tensor(name) for name in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
        )
    assert (rows.dtype, rows.num_virtual_tokens, rows.row_size, rows.are_key_values) == ("float32", 5, 32, False)
    read = torch.frombuffer(bytearray(rows.data), dtype=torch.float32).view(5, 32)
    torch.testing.assert_close(read, shared * (cols[task] @ factors[task]), rtol=1e-6, atol=1e-12)


def test_tensors_of_several_dtypes_are_multiplied_in_float32():
    mixed = tensors(prefix_task_cols=tensors(np.float16)["prefix_task_cols"])
    data = save(mixed)
    assert verify(data).tensor_dtype == "F16, F32"
    rows = np.frombuffer(read_adapter(SPEC, data, task=2).data, np.float32).reshape(5, 8)
    product = mixed["prefix_task_cols"].astype(np.float32)[2] @ mixed["prefix_task_rows"][2]
    np.testing.assert_allclose(rows, mixed["prompt_embeddings"] * product, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({key: bad}, key) for key in SIZES for bad in (0, None, True, "2")),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
        ({"prompt_tuning_init_state_dict_path": ["/etc/passwd"]}, "prompt_tuning_init_state_dict_path"),
        ({"prompt_tuning_init_task": "first"}, "prompt_tuning_init_task"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    ],
)
def test_other_configs_are_refused_naming_the_key(changes, field):
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(json.dumps({**PLAIN, **changes}))
    assert refused.value.field == f"config.{field}"


def test_where_it_was_initialised_from_changes_nothing():
    source = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "/etc/passwd"}
    assert parse_config(json.dumps({**PLAIN, **source, "prompt_tuning_init_task": 1})) == SPEC


@pytest.mark.parametrize("name", sorted(tensors()))
def test_a_missing_misshapen_or_empty_tensor_is_refused_by_name(name):
    whole = tensors()
    for broken in (
        {other: tensor for other, tensor in whole.items() if other != name},
        {**whole, name: whole[name][:1]},
        {**whole, name: whole[name] * 0},
        {**whole, name: np.where(whole[name] == whole[name].max(), np.nan, whole[name])},
        {**whole, name: whole[name].astype(np.float64)},
    ):
        for piece_bytes in (1, 2**30):
            with pytest.raises(AdapterInvalid) as refused:
                verify(save(broken), piece_bytes=piece_bytes)
            assert refused.value.field == f"tensors.{name}"


def test_a_tensor_too_many_is_refused_by_name():
    with pytest.raises(AdapterInvalid) as refused:
        verify(save(tensors(source_prompt=np.ones((5, 8), np.float32))))
    assert refused.value.field == "tensors.source_prompt"


def test_a_bad_first_tensor_is_refused_before_the_others_arrive():
    data = save(tensors(prefix_task_cols=np.zeros((3, 5, 2), np.float32)))  # first in order of bytes
    verifier = AdapterVerifier(SPEC, size_bytes=len(data))
    with pytest.raises(AdapterInvalid, match="all zeros"):
        verifier.feed(data[: -4 * (5 * 8 + 3 * 2 * 8)])


@pytest.mark.parametrize(
    ("factor", "dtype", "problem"),
    [(1e5, "float16", "infinite in float16"), (1e38, "float32", "inf at row"), (1e-9, "float16", "all zeros in")],
)
@pytest.mark.parametrize("piece_bytes", [7, 2**30])
def test_a_product_that_cannot_be_served_is_refused_with_its_task(factor, dtype, problem, piece_bytes):
    # Each tensor alone can be served.
    ones = {name: np.ones_like(tensor) for name, tensor in tensors().items()}
    root = np.float32(factor**0.5)
    ones["prompt_embeddings"] *= root
    ones["prefix_task_rows"] *= root * 4
    ones["prefix_task_cols"][[0, 1]] *= 1e-3 if factor > 1 else 1e4
    data = save(ones)
    verify(data, dtype=dtype)
    with pytest.raises(AdapterInvalid, match=f"prompt of task 2.* {problem}") as refused:
        verify(data, dtype=dtype, all_tasks=True, piece_bytes=piece_bytes)
    assert refused.value.field == "tensors.prompt of task 2"
    read_adapter(SPEC, data, task=1, dtype=dtype)
    with pytest.raises(AdapterInvalid, match=f"prompt of task 2.* {problem}"):
        read_adapter(SPEC, data, task=2, dtype=dtype)


def test_products_that_can_be_served_are_registered():
    data = save(tensors())
    assert verify(data, dtype="float16", all_tasks=True) == verify(data, dtype="float16")


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({"num_virtual_tokens": 100, "token_dim": 4096, "num_tasks": 64, "num_ranks": 8}, True),
        ({"num_tasks": 4096}, True),
        ({"num_tasks": 4097}, False),
        ({"num_ranks": 2**20}, False),
        ({"num_virtual_tokens": 4096, "num_tasks": 1024, "token_dim": 17, "num_ranks": 1}, False),
    ],
)
def test_all_tasks_are_checked_where_that_takes_little(changes, can):
    assert parse_config(json.dumps({**PLAIN, **changes})).can_check_tasks() is can
