"""A prompt is put together with its adapters: their order, text counted apart, and what is refused where."""

import pytest
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument
from softprompt_api.formats import Lora, LoraModule, Rows
from softprompt_inference.adapters.adapter import Adapter, AdapterInfo
from softprompt_inference.composed import Bound, BoundAdapter, Composed, check_context, compose
from softprompt_inference.engine.messages import SoftPromptPart, TextPart
from softprompt_inference.text import Encoded, SoftPrompt

LENGTHS = {"a": 3, "b": 5, "k": 4, "j": 4, "lora": 0, "lora2": 0}


def adapter(name: str) -> AdapterInfo:
    if name.startswith("lora"):
        module = LoraModule(
            name="q", rank=1, scale=1.0, in_features=1, out_features=1, a=bytes(4), b=bytes(4), dtype="float32"
        )
        return Adapter(digest=f"sha256:{name}", content=Lora(modules=(module,))).info
    length = LENGTHS[name]
    rows = Rows(
        data=bytes(4 * length),
        dtype="float32",
        num_virtual_tokens=length,
        row_size=1,
        are_key_values=name in ("k", "j"),
    )
    return Adapter(digest=f"sha256:{name}", content=rows).info


def bound(*front: str, inside: tuple[str, ...] = ()) -> Bound:
    def one(name: str) -> BoundAdapter:
        return BoundAdapter(spelling=name, name=name, version=1, digest=f"sha256:{name}")

    return Bound(front=[one(name) for name in front], inside={name: one(name) for name in inside})


def composed(prompt: Encoded, *front: str) -> Composed:
    inside = tuple(dict.fromkeys(part.adapter for part in prompt if isinstance(part, SoftPrompt)))
    every = bound(*front, inside=inside)
    return compose(prompt, every, [adapter(one.name) for one in every.every])


A, B = SoftPrompt(adapter="a"), SoftPrompt(adapter="b")


def test_soft_prompts_stand_in_order_in_front_and_in_their_places_inside() -> None:
    made = composed([[1, 2], A, [3], B], "b", "lora", "a")
    assert made.parts == [
        SoftPromptPart(digest="sha256:b"),
        SoftPromptPart(digest="sha256:a"),
        TextPart(token_ids=[1, 2]),
        SoftPromptPart(digest="sha256:a"),
        TextPart(token_ids=[3]),
        SoftPromptPart(digest="sha256:b"),
    ]
    assert made.lora == "sha256:lora"
    assert (made.text_ids, made.virtual_tokens) == ([1, 2, 3], 5 + 3 + 3 + 5)


def test_a_response_names_those_in_front_and_then_each_further_one_inside() -> None:
    every = bound("b", "lora", "b", inside=("a", "b")).every
    assert [one.name for one in every] == ["b", "lora", "b", "a"]
    assert bound().every == []


def test_only_text_among_the_first_positions_is_counted() -> None:
    made = composed([[1, 2], A, [3]], "b")  # b b b b b 1 2 a a a 3
    assert [made.count_text(n) for n in range(12)] == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 3]
    assert made.count_text(100) == 3


@pytest.mark.parametrize(
    ("prompt", "front", "message", "field"),
    [
        ([[1]], ("lora", "lora2"), "lora and lora2 are both LoRAs", "adapter"),
        ([[1]], ("k", "j"), "k and j both give keys and values", "adapter"),
        ([[1]], ("a", "k"), "k gives keys and values .* before a", "adapter"),
        ([[1], SoftPrompt(adapter="k")], (), "k gives keys and values", "prompt"),
        ([[1], SoftPrompt(adapter="lora")], (), "lora is a LoRA", "prompt"),
        ([[1]], ("a",) * 17, "has 17 adapters; at most 16", "adapter"),
    ],
)
def test_what_cannot_stand_where_it_is_named_is_refused(
    prompt: Encoded, front: tuple[str, ...], message: str, field: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        composed(prompt, *front)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("max_tokens", "limit", "message", "field"),
    [
        (4, 15, None, ""),
        (5, 15, r"3 tokens \+ 8 virtual tokens \+ max_tokens 5, the limit is 15", "max_tokens"),
        (0, 11, None, ""),
        (0, 10, r"max_tokens 0, the limit is 10", "prompt"),
        (None, 12, None, ""),
        (None, 11, r"3 tokens \+ 8 virtual tokens \+ at least 1 token of output, the limit is 11", "prompt"),
    ],
)
def test_the_virtual_tokens_of_all_count_against_the_context(
    max_tokens: int | None, limit: int, message: str | None, field: str
) -> None:
    made = composed([[1, 2], A, [3]], "b")
    if message is None:
        check_context(made, max_tokens=max_tokens, limit=limit)
        return
    with pytest.raises(ContextLengthExceeded, match=message) as refused:
        check_context(made, max_tokens=max_tokens, limit=limit)
    assert refused.value.field == field
