"""The rules of pointers, without a store."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.errors import DataCorrupted
from softprompt_registry.pointers import Pointers, decode

THREE = Pointers(highest=30, moved={"prod": 10, "beta": 30}, revision=7)


def test_latest_is_the_highest_version_unless_it_was_moved():
    assert THREE.target("latest") == 30
    assert THREE.after("latest", 10).target("latest") == 10
    assert THREE.after("latest", 10).after("latest", 30) == Pointers(highest=30, moved=THREE.moved, revision=9)


def test_an_alias_points_to_one_version_and_a_version_may_have_many():
    assert THREE.aliases_of(30) == ("beta", "latest")
    assert THREE.aliases_of(10) == ("prod",)
    assert THREE.aliases_of(20) == ()
    assert THREE.target("nobody") == 0


def test_a_removed_alias_points_nowhere():
    assert THREE.after("prod", 0).target("prod") == 0
    assert THREE.after("prod", 0).aliases_of(10) == ()


def test_a_name_without_versions_has_no_latest():
    nothing = decode([[None, None, None], [], []])
    assert nothing == Pointers(highest=0, moved={}, revision=0)
    assert nothing.target("latest") == 0


def test_what_cannot_be_read_is_corrupted():
    found = decode([[b"3", b"5", None], [b"prod", b"10"], [b"30"]])
    assert found == Pointers(highest=30, moved={"prod": 10}, revision=3, next=5)
    for replies in (
        [[b"x", b"5", None], [], []],
        [[b"3", b"x", None], [], []],
        [[b"3", b"5", None], [b"prod", b"1O"], []],
        [[b"3", b"5", None], [b"\xff", b"1"], []],
        [[b"3", b"5", b"0" * 64], [], []],
    ):
        with pytest.raises(DataCorrupted):
            decode(replies)


@given(st.lists(st.tuples(st.sampled_from(["latest", "a", "b"]), st.integers(1, 4)), max_size=12))
def test_pointers_do_what_a_dict_of_all_of_them_does(moves):
    pointers, model = Pointers(highest=4, moved={}, revision=0), {"latest": 4}
    for alias, version_id in moves:
        pointers, model = pointers.after(alias, version_id), {**model, alias: version_id}
    assert pointers.revision == len(moves)
    for version_id in range(1, 5):
        expected = tuple(sorted(alias for alias, target in model.items() if target == version_id))
        assert pointers.aliases_of(version_id) == expected
