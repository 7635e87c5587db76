import pytest

from benchmarks.workload import Lengths, Request, make_requests, num_output_tokens, without_adapters

ADAPTERS = ("a", "b", "c")


def requests(repeat: int, *, what: str = "B0", count: int = 5, vocab_size: int = 1000) -> list[Request]:
    return make_requests(
        what,
        seed=1,
        repeat=repeat,
        count=count,
        prompts=Lengths(shortest=2, longest=9),
        outputs=Lengths(shortest=3, longest=7),
        vocab_size=vocab_size,
        adapters=ADAPTERS,
    )


def test_the_same_seed_and_repeat_make_the_same_requests() -> None:
    assert requests(0) == requests(0)


@pytest.mark.parametrize("second", [requests(1), requests(0, what="another measurement")])
def test_repeats_and_measurements_are_equally_heavy_and_share_no_prompt(second: list[Request]) -> None:
    first = requests(0)
    for one, other in zip(first, second, strict=True):
        assert len(one.prompt_ids) == len(other.prompt_ids)
        assert one.num_tokens == other.num_tokens
        assert one.prompt_ids != other.prompt_ids


def test_lengths_and_ids_stay_within_their_ranges() -> None:
    for request in requests(0, count=200):
        assert 2 <= len(request.prompt_ids) <= 9
        assert 3 <= request.num_tokens <= 7
        assert all(256 <= token_id < 1000 for token_id in request.prompt_ids)


def test_a_small_vocabulary_has_ids_too() -> None:
    assert all(id_ < 300 for request in requests(0, vocab_size=300) for id_ in request.prompt_ids)


def test_fewer_requests_are_the_beginning_of_more() -> None:
    assert requests(0, count=3) == requests(0, count=5)[:3]


def test_adapters_take_turns_across_repeats() -> None:
    used = [request.adapter for repeat in (0, 1) for request in requests(repeat)]
    assert used == [ADAPTERS[index % 3] for index in range(10)]


def test_warm_up_has_adapters_in_turn_too() -> None:
    assert [request.adapter for request in requests(-1)] == ["a", "b", "c", "a", "b"]


def test_without_adapters_the_work_is_the_same() -> None:
    made = requests(0)
    bare = without_adapters(made)
    assert {request.adapter for request in bare} == {None}
    assert [request.prompt_ids for request in bare] == [request.prompt_ids for request in made]
    assert num_output_tokens(bare) == num_output_tokens(made) == sum(request.num_tokens for request in made)
