"""A sequence knows what to compute next, what to ask of the sampler, and when it has ended."""

from typing import Any

import pytest
from softprompt_api.params import SamplingParams
from softprompt_inference.engine import sequence as sequence_module
from softprompt_inference.engine.keys import PageKey, VirtualIds, page_key, partial_key, root_key, under_lora
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import AddRequest, Finish
from softprompt_inference.engine.plan import Sampled
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.engine.sequence import Sequence, State


@pytest.fixture
def virtual_ids() -> VirtualIds:
    virtual_ids = VirtualIds(50)
    virtual_ids.assign("sha256:a", 3)
    virtual_ids.assign("sha256:k", 5, are_key_values=True)
    return virtual_ids


def sequence_of(request: AddRequest, virtual_ids: VirtualIds, *, max_model_len: int = 32) -> Sequence:
    slots = LoraSlots(1)
    if request.lora:
        slots.assign(request.lora)
    return make_sequence(request, virtual_ids=virtual_ids, max_model_len=max_model_len, lora_slots=slots)


def test_parts_become_one_list_of_ids_in_their_order(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", [1, 2], "a", [3]), virtual_ids)
    assert sequence.token_ids == [1, 2, 50, 51, 52, 3]
    assert sequence.prompt_length == 6
    assert sequence.adapters == {"sha256:a"}
    assert sequence.soft_prompt_ends == (5,)
    assert sequence.state is State.WAITING


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(["a", [7, 8]], 3), (["k", [7]], 5), (["a", "a", [7]], 3), ([[7], "a"], 0), ([[7]], 0)],
)
def test_chunks_tell_how_long_the_soft_prompt_is_that_they_begin_with(
    fakes, virtual_ids, prompt, expected
) -> None:
    sequence = sequence_of(fakes.request("0", *prompt), virtual_ids)
    assert sequence.chunk(1).prefix_len == expected
    assert sequence.following_chunk().prefix_len == expected


def test_what_was_generated_is_not_in_the_prompt(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", [7, 8]), virtual_ids)
    sequence.num_computed = 2
    sequence.accept(Sampled(token_id=9))
    assert not sequence.chunk(1).in_prompt
    assert not sequence.following_chunk().in_prompt


def test_only_the_chunk_that_reaches_the_end_asks_for_a_token(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", "a", [7, 8], seed=5), virtual_ids)
    first = sequence.chunk(4)
    assert (first.token_ids, first.start, first.sample) == ([50, 51, 52, 7], 0, None)
    sequence.num_computed = 4
    last = sequence.chunk(1)
    assert (last.token_ids, last.start) == ([8], 4)
    assert first.in_prompt
    assert last.in_prompt
    assert last.sample is not None
    assert (last.sample.seed, last.sample.index, last.sample.seen) == (5, 0, None)


def test_the_next_chunk_computes_the_sampled_token(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", [7, 8]), virtual_ids)
    sequence.num_computed = 2
    sequence.accept(Sampled(token_id=9))
    chunk = sequence.chunk(1)
    assert (chunk.token_ids, chunk.start) == ([9], 2)
    assert chunk.sample is not None
    assert chunk.sample.index == 1


def test_penalties_see_the_text_and_the_output_and_no_virtual_token(fakes, virtual_ids) -> None:
    params = SamplingParams(presence_penalty=1.0)
    sequence = sequence_of(fakes.request("0", "a", [7, 8, 7], params=params), virtual_ids)
    for token_id in (9, 8, 9):
        sequence.accept(Sampled(token_id=token_id))
    sequence.num_computed = len(sequence.token_ids) - 1
    sample = sequence.chunk(1).sample
    assert sample is not None
    assert sample.seen is not None
    assert list(sample.seen.token_ids) == [7, 8, 9]
    assert list(sample.seen.counts) == [0, 1, 2]


@pytest.mark.parametrize(
    ("params", "tokens", "finish", "stop_token_id"),
    [
        (SamplingParams(max_tokens=3), [1], None, None),
        (SamplingParams(max_tokens=3), [1, 1, 1], Finish.LENGTH, None),
        (SamplingParams(max_tokens=None), [1] * 29, None, None),
        (SamplingParams(max_tokens=None), [1] * 30, Finish.LENGTH, None),
        (SamplingParams(max_tokens=3), [1, 40], Finish.STOP, None),
        (SamplingParams(max_tokens=3), [1, 1, 40], Finish.STOP, None),
        (SamplingParams(max_tokens=3, ignore_eos=True), [40], None, None),
        (SamplingParams(max_tokens=3, stop_token_ids=[4]), [1, 4], Finish.STOP, 4),
        (SamplingParams(max_tokens=3, stop_token_ids=[40]), [40], Finish.STOP, None),
        (SamplingParams(max_tokens=3, stop_token_ids=[40], ignore_eos=True), [40], Finish.STOP, 40),
    ],
)
def test_the_end_is_told_with_its_reason(fakes, virtual_ids, params, tokens, finish, stop_token_id) -> None:
    sequence = sequence_of(fakes.request("0", [7, 8], eos=[40], params=params), virtual_ids)
    outputs = [sequence.accept(Sampled(token_id=token_id)) for token_id in tokens]
    assert (outputs[-1].finish, outputs[-1].stop_token_id) == (finish, stop_token_id)
    assert all(output.finish is None for output in outputs[:-1])


@pytest.mark.parametrize(
    ("ignore_eos", "num_outputs", "banned"),
    [(False, 0, (4, 40)), (False, 1, (4, 40)), (False, 2, ()), (True, 0, (4,))],
)
def test_ends_are_banned_before_min_tokens(fakes, virtual_ids, ignore_eos, num_outputs, banned) -> None:
    params = SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=[4], ignore_eos=ignore_eos)
    sequence = sequence_of(fakes.request("0", [7], eos=[40], params=params), virtual_ids)
    for _ in range(num_outputs):
        sequence.accept(Sampled(token_id=9))
    sequence.num_computed = num_outputs
    sample = sequence.chunk(1).sample
    assert sample is not None
    assert sample.banned_ids == banned


def test_page_keys_chain_from_the_salt_over_virtual_and_text_ids(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", "a", [7, 8, 9], salt="x"), virtual_ids)
    first = page_key(root_key("x"), [50, 51], virtual_ids)
    second = page_key(first, [52, 7], virtual_ids)
    assert list(sequence.page_keys(2, 0, 3)) == [first, second, page_key(second, [8, 9], virtual_ids)]
    assert list(sequence.page_keys(2, 1, 2)) == [second]


def test_the_key_of_an_end_is_partial_inside_a_page(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", "a", [7, 8, 9]), virtual_ids)
    first = page_key(root_key(""), [50, 51], virtual_ids)
    assert sequence.end_key(2, 1) == partial_key(root_key(""), [50], virtual_ids)
    assert sequence.end_key(2, 2) == first
    assert sequence.end_key(2, 3) == partial_key(first, [52], virtual_ids)


def test_a_lora_enters_the_chain_with_the_first_position_that_it_computes(fakes, virtual_ids) -> None:
    def keys(lora: str, *parts: str | list[int]) -> list[bytes]:
        sequence = sequence_of(fakes.request("0", *parts, lora=lora), virtual_ids)
        return list(sequence.page_keys(2, 0, len(sequence.token_ids) // 2))

    root = root_key("")
    first = page_key(root, [53, 54], virtual_ids)
    given = page_key(first, [55, 56], virtual_ids)
    third = page_key(under_lora(given, "sha256:x"), [57, 7], virtual_ids)
    with_given = keys("x", "k", [7, 8, 9])
    assert with_given == [first, given, third, page_key(third, [8, 9], virtual_ids)]
    assert keys("", "k", [7, 8, 9])[:2] == with_given[:2]
    assert not set(keys("", "k", [7, 8, 9])[2:]) & set(with_given[2:])
    assert keys("x", "a", [7])[0] == page_key(under_lora(root, "sha256:x"), [50, 51], virtual_ids)
    assert not set(keys("x", "a", [7, 8, 9])) & set(keys("y", "a", [7, 8, 9]))


@pytest.mark.parametrize(("end", "is_shared"), [(5, True), (6, False), (8, False)])
@pytest.mark.parametrize("page_size", [2, 3, 4, 5, 16])
def test_the_end_of_what_is_given_has_one_key_under_all_loras(
    fakes, virtual_ids, page_size: int, end: int, is_shared: bool
) -> None:
    requests = [fakes.request("0", "k", "a", [7], lora=lora) for lora in ("", "x", "y")]
    keys = {sequence_of(request, virtual_ids).end_key(page_size, end) for request in requests}
    assert len(keys) == (1 if is_shared else 3)


@pytest.mark.parametrize(
    ("parts", "known_ends", "num_pages", "copied_end", "num_positions"),
    [
        (("a", [7]), (), 0, None, 0),
        (("a", [7]), (3,), 0, 3, 3),
        (("a", [7] * 9), (3, 4), 1, None, 4),
        (("a", [7] * 9), (3, 4, 8), 2, None, 8),
        (("a", [7] * 9), (3, 8), 0, 3, 3),  # a page behind one that is missing
        (("a", "a", [7]), (3, 6), 0, 3, 3),
        (("a", "a", [7]), (3, 4, 6), 1, 6, 6),
        (("a",), (3,), 0, 3, 2),  # the last position is computed
        (([7], "a"), (4,), 0, 4, 3),
        (([7] * 2, "a"), (4, 5), 1, None, 4),
        (([7] * 8,), (4, 8), 1, 8, 7),
        (([7] * 8,), (8,), 0, None, 0),
    ],
)
def test_the_known_beginning_ends_with_a_page_or_a_soft_prompt(
    fakes, virtual_ids, parts, known_ends, num_pages, copied_end, num_positions
) -> None:
    sequence = sequence_of(fakes.request("0", *parts), virtual_ids)
    known = {sequence.end_key(4, end) for end in known_ends}
    prefix = sequence.find_prefix(4, known.__contains__)
    assert (prefix.num_pages, prefix.num_positions) == (num_pages, num_positions)
    assert prefix.copy_key == (None if copied_end is None else sequence.end_key(4, copied_end))


def test_a_reset_sequence_keeps_its_ids_and_outputs(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", [7, 8]), virtual_ids)
    sequence.page_ids, sequence.num_computed = [3], 2
    sequence.accept(Sampled(token_id=9))
    sequence.reset(State.WAITING)
    assert (sequence.page_ids, sequence.num_computed) == ([], 0)
    assert (sequence.token_ids, sequence.num_outputs) == ([7, 8, 9], 1)


def test_cached_positions_are_told_with_the_first_output_only(fakes, virtual_ids) -> None:
    sequence = sequence_of(fakes.request("0", [7, 8]), virtual_ids)
    sequence.num_cached = 1
    assert [sequence.accept(Sampled(token_id=9)).cached_tokens for _ in range(2)] == [1, None]


def test_the_pages_of_one_prompt_are_hashed_once_for_all_its_choices(
    fakes, virtual_ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def hash_page(*args: Any) -> PageKey:
        hashed.append(args)
        return page_key(*args)

    monkeypatch.setattr(sequence_module, "page_key", hash_page)
    prompt = ("a", list(range(9)))  # three full pages of four
    choices = [sequence_of(fakes.request(str(index), *prompt, seed=index), virtual_ids) for index in range(3)]
    for newer, older in zip(choices[1:], choices, strict=False):
        newer.share_keys(older)
    for sequence, token_id in zip(choices, (5, 6, 7), strict=True):
        for _ in range(4):
            sequence.accept(Sampled(token_id=token_id))
    assert list(choices[1].page_keys(4, 0, 2)) == list(choices[0].page_keys(4, 0, 2))
    assert len(hashed) == 2
    keys = [list(sequence.page_keys(4, 0, 4)) for sequence in choices]
    assert len(hashed) == 3 + 3
    assert keys[0][:3] == keys[1][:3] == keys[2][:3]
    assert len({sequence_keys[3] for sequence_keys in keys}) == 3  # the outputs


@pytest.mark.parametrize(
    "other",
    [
        {"salt": "acme"},
        {"lora": "x"},
        {"parts": ["a", [1, 2, 3, 4, 6]]},
        {"parts": ["k", [1, 2, 3]]},
        {"parts": [[1]]},
    ],
)
def test_what_keys_depend_on_is_never_shared(fakes, virtual_ids, other) -> None:
    first = sequence_of(fakes.request("0", "a", [1, 2, 3, 4, 5]), virtual_ids)
    first_keys = list(first.page_keys(4, 0, 2))
    fields = {"parts": ["a", [1, 2, 3, 4, 5]], **other}
    parts = fields.pop("parts")
    second, alone = (sequence_of(fakes.request("1", *parts, **fields), virtual_ids) for _ in range(2))
    second.share_keys(first)
    num_pages = second.prompt_length // 4
    assert list(second.page_keys(4, 0, num_pages)) == list(alone.page_keys(4, 0, num_pages))
    assert list(first.page_keys(4, 0, 2)) == first_keys
