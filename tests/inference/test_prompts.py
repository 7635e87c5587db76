"""Prompts in parts become ids and soft prompts, each in its place."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.prompts import (
    PartsPrompt,
    PromptEncoder,
    TextPrompt,
    encode_parts,
    soft_prompts_in,
    text_ids_of,
)
from softprompt_inference.text import Encoded, SoftPrompt, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models
from tokenizers.processors import TemplateProcessing

A, B = SoftPrompt(adapter="a"), SoftPrompt(adapter="b")
BOS, X, Y = 0, 1, 2


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    """One id for each character; it begins texts with BOS."""
    backend = Backend(models.BPE(vocab={"<s>": BOS, "x": X, "y": Y}, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend, None, [BOS])


@pytest.mark.parametrize(
    ("parts", "encoded"),
    [
        (["x"], [[BOS, X]]),
        (["x", "y"], [[BOS, X, Y]]),
        ([A, "x"], [A, [BOS, X]]),
        (["x", A, "y"], [[BOS, X], A, [Y]]),
        ([A, B, "x", A], [A, B, [BOS, X], A]),
        (["", A, "x", "", "y", B], [A, [BOS, X, Y], B]),
        ([A, [Y, Y], "x"], [A, [Y, Y], [X]]),
        (["x", [Y], A, [X]], [[BOS, X], [Y], A, [X]]),
        ([A], [A]),
        ([""], [[BOS]]),
        ([], [[BOS]]),
    ],
)
def test_special_tokens_begin_the_first_text_and_soft_prompts_keep_their_places(
    characters: Tokenizer, parts: list[Any], encoded: Encoded
) -> None:
    assert encode_parts(characters, PartsPrompt(parts=parts), max_tokens=100) == encoded
    bare = [part if isinstance(part, SoftPrompt) else [one for one in part if one != BOS] for part in encoded]
    plain = PartsPrompt(parts=parts, add_special_tokens=False)
    assert encode_parts(characters, plain, max_tokens=100) == bare


def test_neighbouring_texts_are_one_text_and_those_around_a_soft_prompt_are_two() -> None:
    tokenizer = Tokenizer.load(resolve_model(DEFAULT_MODEL))
    encoded = encode_parts(tokenizer, PartsPrompt(parts=["Hel", "lo wor", A, "ld"]), max_tokens=100)
    assert encoded == [tokenizer.encode("Hello wor"), A, tokenizer.encode("ld")]
    assert text_ids_of(encoded) != tokenizer.encode("Hello world")


def test_the_text_and_the_soft_prompts_of_a_prompt_are_told_apart() -> None:
    encoded: Encoded = [A, [1, 2], B, A, [3]]
    assert text_ids_of(encoded) == [1, 2, 3]
    assert soft_prompts_in(encoded) == ["a", "b"]


def test_what_cannot_fit_is_refused_unencoded_with_numbers(characters: Tokenizer) -> None:
    with pytest.raises(ContextLengthExceeded, match="40 characters and 3 soft prompts") as refused:
        encode_parts(characters, PartsPrompt(parts=["x" * 40, A, A, A]), max_tokens=10)
    assert "the limit is 10" in refused.value.message


def test_a_lone_surrogate_in_a_part_is_refused(characters: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="lone surrogate"):
        encode_parts(characters, PartsPrompt(parts=["x", A, "\udfff"]), max_tokens=10)


async def test_tenants_take_turns_for_the_threads(characters: Tokenizer) -> None:
    encoded: list[str] = []
    with ThreadPoolExecutor(1) as executor:
        prompts = PromptEncoder(characters, vocab_size=3, max_tokens=100, executor=executor, num_threads=1)

        async def encode(tenant: str) -> None:
            await prompts.encode(TextPrompt(text="x"), tenant=tenant)
            encoded.append(tenant)

        async with asyncio.TaskGroup() as all_of_them:
            for tenant in ("flood",) * 6 + ("other",):
                all_of_them.create_task(encode(tenant))
    assert encoded.index("other") < 3  # behind the one that is encoded, and the first in line
