"""Stop strings are found whole, at once, and however the text is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_inference.text.stops import StopScanner


def read(pieces: list[str], stops: list[str]) -> tuple[str | None, int]:
    """The stop string found and how many characters were read; None and all of them when none was found."""
    scanner, num_read = StopScanner(stops), 0
    for piece in pieces:
        found = scanner.feed(piece)
        if found is not None:
            return found[0], num_read + found[1]
        num_read += len(piece)
    return None, num_read


def test_a_stop_string_within_one_piece_is_found() -> None:
    assert read(["hello STOP there"], ["STOP"]) == ("STOP", 10)


def test_a_stop_string_across_many_pieces_is_found() -> None:
    assert read(["a", "a", "b", "a", "ab"], ["aabaab"]) == ("aabaab", 6)


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert read(["abcdef"], ["abcdef", "cd"]) == ("cd", 4)


def test_of_several_that_end_together_the_longest_wins() -> None:
    assert read(["xabc"], ["c", "abc", "bc"]) == ("abc", 4)


def test_a_prefix_that_fails_may_hold_the_beginning_of_another_match() -> None:
    assert read(["aaab"], ["aab"]) == ("aab", 4)


def test_what_ends_too_early_may_be_the_beginning_of_another() -> None:
    scanner = StopScanner(["aa"])
    assert scanner.feed("aaa", counts=False) is None
    assert scanner.feed("a") == ("aa", 1)


@pytest.mark.parametrize(("text", "held"), [("x", 0), ("xa", 1), ("xab", 2), ("xabx", 0), ("aba", 1)])
def test_only_what_may_become_a_stop_string_is_held(text: str, held: int) -> None:
    scanner = StopScanner(["abc"])
    assert scanner.feed(text) is None
    assert scanner.num_held == held


@given(
    text=st.text("ab\u00e9", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=4),
)
def test_it_finds_what_a_search_of_every_prefix_finds(text: str, cuts: list[int], stops: list[str]) -> None:
    ends = [
        (next(stop for stop in sorted(stops, key=len, reverse=True) if text[:end].endswith(stop)), end)
        for end in range(1, len(text) + 1)
        if any(text[:end].endswith(stop) for stop in stops)
    ]
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert read(pieces, stops) == (ends[0] if ends else (None, len(text)))
