"""Patterns for names of modules: matched as PEFT does, and never for long."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import checks
from softprompt_api.formats.patterns import pattern_map, values_of

NAMES = st.lists(st.sampled_from(["a", "b", "ab", "0", "1", "10", "x_y"]), min_size=1, max_size=4).map(".".join)
ATOMS = ["a", "b", "0", "1", ".", "\\.", "\\d", "\\w", "[0-9]", "[ab]", "[-a_]", "[0-1x-z-]", "x_y"]
ALTERNATIVES = st.tuples(
    st.sampled_from(["", "", "^"]),
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5).map("".join),
    st.sampled_from(["", "", "$"]),
).map("".join)
PATTERNS = st.lists(ALTERNATIVES, min_size=1, max_size=3).map("|".join)


@given(patterns=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=4), names=st.sets(NAMES, min_size=1))
@settings(max_examples=500, deadline=None)
def test_the_first_pattern_that_matches_counts_as_in_peft(patterns, names):
    from peft.utils.other import get_pattern_key

    pattern_map(checks.size)("rank_pattern", patterns)
    expected = {name: patterns.get(get_pattern_key(patterns.keys(), name), 0) for name in names}
    assert values_of(tuple(patterns.items()), names, 0) == expected


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("^self_attn.q_proj", False),
        (r"^model.layers.[0-3].self_attn\.q_proj$", True),
        ("k_proj|q_proj", True),
        ("k_proj|^q_proj", False),
        ("x.model.layers.0.self_attn.q_proj", False),
    ],
)
def test_a_pattern_is_the_whole_name_or_its_end_behind_a_dot(pattern, matched):
    name = "model.layers.0.self_attn.q_proj"
    assert values_of(((pattern, 2.0),), [name], 1.0) == {name: 2.0 if matched else 1.0}


@pytest.mark.parametrize(
    "pattern",
    [
        "", "|", "a|", "(a+)+", ".*a", "a+", "a?", "a{9}", "(a|b)c", "(?=a)", "[z-a]", "[^a]", "a^b", "a$b",
        "a\nb", r"\1", "é",
    ],
)  # fmt: skip
def test_other_patterns_are_refused(pattern):
    with pytest.raises(AdapterInvalid) as refused:
        pattern_map(checks.size)("rank_pattern", {"q_proj": 1, pattern: 2})
    assert refused.value.field == "config.rank_pattern"
    assert refused.value.message.isascii()


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("most", "more"),
    [
        ([], ["a" * 257]),
        ([f"{number:0256}" for number in range(256)], ["x"]),
        ([f"{'a|' * 127}{number}" for number in range(8)], ["x"]),
        ([str(number) for number in range(1024)], ["x"]),
        ([f"[0-9]{number}" for number in range(512)], ["x"]),
    ],
    ids=["characters in one", "characters", "alternatives", "patterns", "classes"],
)
def test_patterns_are_taken_up_to_a_limit(key, most, more):
    check = pattern_map(checks.size)
    check(key, dict.fromkeys(most, 1))
    with pytest.raises(AdapterInvalid, match="at most") as refused:
        check(key, dict.fromkeys(most + more, 1))
    assert refused.value.field == f"config.{key}"


class WatchedName(str):
    """A name that counts how often one of its characters is looked at."""

    num_looks = 0

    def __reversed__(self):
        for character in reversed(str(self)):
            WatchedName.num_looks += 1
            yield character


def test_a_name_is_looked_through_once_however_many_patterns_there_are():
    patterns = tuple((f"{'.' * 59}b|{'.' * number}", 1.0) for number in range(1, 196))
    name = WatchedName("a." * 100 + "c")
    assert values_of(patterns, [name], 0.0) == {name: 1.0}
    assert 0 < WatchedName.num_looks <= len(name)
