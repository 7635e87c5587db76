"""Prompts become the ids that transformers gives them; what cannot be a prompt is refused with its field."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument, Unsupported
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.prompts import PartsPrompt, encode_parts
from softprompt_inference.text import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["Hello there", "  two  spaces\n\n", "12345", "naïve 🦙 日本", "a<|im_start|>b"])
def test_text_has_the_ids_that_transformers_gives_it(
    theirs: PreTrainedTokenizerBase, tokenizer: Tokenizer, text: str
) -> None:
    assert tokenizer.encode(text) == theirs(text).input_ids


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("Hi <|im_start|> you")) == "Hi <|im_start|> you"


def test_decoding_leaves_special_tokens_out_when_told(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a<|im_start|>b"), skip_special_tokens=True) == "ab"


def test_token_bytes_are_exact_where_the_text_is_not_whole(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦙")
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "🦙".encode()
    assert tokenizer.token_text(token_ids[0]) == "\ufffd"


def test_every_end_of_sequence_id_of_the_files_is_known(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Tokenizer.load(copy).eos_token_ids == (2, 7)


def test_the_digest_follows_the_tokenizer(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    assert Tokenizer.load(copy).sha256 == tokenizer.sha256
    text = (copy / "tokenizer.json").read_text().replace("<gh_stars>", "<gl_stars>")
    (copy / "tokenizer.json").write_text(text)
    assert Tokenizer.load(copy).sha256 != tokenizer.sha256


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="tokenizer"):
        Tokenizer.load(tmp_path)


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    text = PartsPrompt(parts=["a" * 5_000_000])
    with pytest.raises(ContextLengthExceeded, match=r"5000000 characters.*the limit is 8192") as caught:
        encode_parts(tokenizer, text, max_tokens=8192)
    assert caught.value.field == "prompt"


def test_text_that_may_fit_is_encoded(tokenizer: Tokenizer) -> None:
    [ids] = encode_parts(tokenizer, PartsPrompt(parts=["a b c"]), max_tokens=3)
    assert isinstance(ids, list)
    assert len(ids) == 3


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="surrogate"):
        tokenizer.encode("a\ud800")


async def test_encoding_leaves_the_interpreter_free(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20_000
    encoding = asyncio.create_task(asyncio.to_thread(tokenizer.encode, text))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert len(await encoding) > 100_000
    # Held throughout, the lock would leave a handful of turns.
    assert num_turns > 50
