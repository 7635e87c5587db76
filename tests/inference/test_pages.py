"""Pages are counted right, found again by content, and given up in the right order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from softprompt_inference.engine.keys import VirtualIds, page_key, partial_key, root_key, under_lora
from softprompt_inference.engine.pages import PagePool


@pytest.fixture
def pool() -> PagePool:
    return PagePool(num_pages=4, page_size=2)


def test_pages_for_rounds_up(pool: PagePool) -> None:
    assert [pool.pages_for(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 2]


def test_allocated_pages_are_distinct_and_come_back(pool: PagePool) -> None:
    page_ids = pool.allocate(4)
    assert sorted(page_ids) == [0, 1, 2, 3]
    assert pool.num_available == 0
    pool.check([page_ids])
    pool.release(page_ids)
    assert pool.num_available == 4
    pool.check([])


def test_more_than_is_available_is_not_given(pool: PagePool) -> None:
    pool.allocate(3)
    with pytest.raises(AssertionError):
        pool.allocate(2)


def test_a_registered_page_is_found_while_held_and_after(pool: PagePool) -> None:
    held = pool.allocate(2)
    pool.register(held[0], b"a")
    assert pool.lookup([b"a", b"b"]) == [held[0]]
    pool.release(held)
    assert pool.num_available == 4
    assert pool.lookup([b"a"]) == [held[0]]
    pool.check([])


def test_a_lookup_ends_at_the_first_missing_key(pool: PagePool) -> None:
    held = pool.allocate(2)
    pool.register(held[0], b"a")
    pool.register(held[1], b"c")
    assert pool.lookup([b"a", b"b", b"c"]) == [held[0]]


def test_a_shared_page_stays_until_its_last_holder_leaves(pool: PagePool) -> None:
    first = pool.allocate(1)
    pool.register(first[0], b"a")
    pool.share(first)
    pool.check([first, first])
    pool.release(first)
    pool.check([first])
    assert pool.num_held == 1
    pool.release(first)
    pool.share(pool.lookup([b"a"]))
    pool.check([first])


def test_free_pages_go_before_cached_ones_and_the_least_recently_used_first(pool: PagePool) -> None:
    held = pool.allocate(3)
    for page_id, key in zip(held, (b"a", b"b", b"c"), strict=True):
        pool.register(page_id, key)
    for page_id in held:
        pool.release([page_id])
    pool.allocate(1)
    assert len(pool.lookup([b"a", b"b", b"c"])) == 3
    pool.share([held[0]])
    pool.release([held[0]])
    pool.allocate(1)
    assert pool.lookup([b"b"]) == []
    assert pool.lookup([b"a"]) == [held[0]]


def test_the_end_of_a_sequence_is_evicted_before_its_start(pool: PagePool) -> None:
    held = pool.allocate(4)
    for page_id, key in zip(held, (b"a", b"b", b"c", b"d"), strict=True):
        pool.register(page_id, key)
    pool.release(held)
    pool.allocate(2)
    assert pool.lookup([b"a", b"b", b"c"]) == held[:2]


def test_the_first_page_with_a_key_keeps_it(pool: PagePool) -> None:
    held = pool.allocate(2)
    pool.register(held[0], b"a")
    pool.register(held[1], b"a")
    assert pool.lookup([b"a"]) == [held[0]]
    pool.release(held)
    pool.check([])


def test_pages_released_as_bad_are_never_found_again(pool: PagePool) -> None:
    held = pool.allocate(2)
    pool.register(held[0], b"a")
    pool.share([held[0]])
    pool.release(held, forget=True)
    assert pool.lookup([b"a"]) == []
    pool.check([held[:1]])
    pool.release(held[:1])
    pool.check([])


def test_a_page_with_a_partial_key_is_kept_though_it_is_not_full(pool: PagePool) -> None:
    held = pool.allocate(1)
    pool.register_partial(held[0], b"start")
    pool.release(held)
    assert b"start" in pool
    assert pool.lookup([b"start"]) == held
    pool.check([])
    assert held[0] not in pool.allocate(3)
    pool.allocate(1)
    assert b"start" not in pool


def test_a_page_that_is_given_away_loses_all_its_keys(pool: PagePool) -> None:
    held = pool.allocate(4)
    pool.register_partial(held[0], b"start")
    pool.register_partial(held[0], b"longer start")
    pool.register(held[0], b"whole")
    pool.release(held)
    pool.check([])
    pool.allocate(4)
    assert not any(key in pool for key in (b"start", b"longer start", b"whole"))


def test_the_newest_page_takes_a_partial_key(pool: PagePool) -> None:
    first, second = pool.allocate(2)
    for page_id in (first, second, second):
        pool.register_partial(page_id, b"start")
        assert pool.lookup([b"start"]) == [page_id]
        pool.check([[first, second]])
    pool.release([first])
    pool.check([[second]])
    assert first in pool.allocate(3)


def test_an_idle_page_that_loses_its_last_key_is_free(pool: PagePool) -> None:
    first, second = pool.allocate(2)
    pool.register_partial(first, b"start")
    pool.release([first])
    pool.register_partial(second, b"start")
    pool.check([[second]])
    assert pool.num_available == 3


def test_an_idle_page_that_loses_its_partial_key_is_still_found_whole(pool: PagePool) -> None:
    first, second = pool.allocate(2)
    pool.register_partial(first, b"start")
    pool.register(first, b"whole")
    pool.release([first])
    pool.register_partial(second, b"start")
    assert pool.lookup([b"whole"]) == [first]
    pool.check([[second]])


def test_check_notices_a_lost_reference(pool: PagePool) -> None:
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check([])


@settings(deadline=None)
@given(st.data())
def test_counts_hold_under_any_sequence_of_operations(data: st.DataObject) -> None:
    pool = PagePool(num_pages=6, page_size=2)
    holders: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["allocate", "release", "share", "register", "partial", "forget"])):
            case "allocate":
                holders.append(pool.allocate(data.draw(st.integers(0, pool.num_available))))
            case "share":
                hits = pool.lookup(data.draw(st.lists(st.sampled_from([b"a", b"b", b"c"]), unique=True)))
                hits += pool.lookup(data.draw(st.sampled_from([[], [b"x"], [b"y"]])))
                pool.share(hits)
                holders.append(hits)
            case "register" if any(holders):
                page_id = data.draw(st.sampled_from([page_id for pages in holders for page_id in pages]))
                pool.register(page_id, data.draw(st.sampled_from([b"a", b"b", b"c"])))
            case "partial" if any(holders):
                page_id = data.draw(st.sampled_from([page_id for pages in holders for page_id in pages]))
                key = data.draw(st.sampled_from([b"x", b"y"]))
                pool.register_partial(page_id, key)
                assert pool.lookup([key]) == [page_id]
            case "release" | "forget" as how if holders:
                pool.release(holders.pop(data.draw(st.integers(0, len(holders) - 1))), forget=how == "forget")
        pool.check(holders)
    for holder in holders:
        pool.release(holder)
    pool.check([])
    assert pool.num_available == 6


def test_keys_depend_on_every_id_before_the_page() -> None:
    virtual_ids = VirtualIds(100)
    first, other = (page_key(root_key(""), ids, virtual_ids) for ids in ([1, 2], [1, 3]))
    assert first != other
    assert page_key(first, [5, 6], virtual_ids) != page_key(other, [5, 6], virtual_ids)
    assert page_key(first, [5, 6], virtual_ids) == page_key(first, [5, 6], virtual_ids)


def test_a_partial_key_is_no_key_of_a_full_page() -> None:
    virtual_ids = VirtualIds(100)
    virtual_ids.assign("sha256:a", 4)
    for token_ids in ([1, 2], [1, 100], [100, 101]):
        assert partial_key(root_key(""), token_ids, virtual_ids) != page_key(root_key(""), token_ids, virtual_ids)


def test_partial_keys_depend_on_parent_and_ids() -> None:
    virtual_ids = VirtualIds(100)
    virtual_ids.assign("sha256:a", 4)
    parents = [root_key(""), root_key("tenant"), page_key(root_key(""), [1, 2], virtual_ids)]
    keys = {partial_key(parent, ids, virtual_ids) for parent in parents for ids in ([100], [100, 101], [101], [7])}
    assert len(keys) == 12


def test_keys_differ_between_salts() -> None:
    virtual_ids = VirtualIds(100)
    assert page_key(root_key("a"), [1, 2], virtual_ids) != page_key(root_key("b"), [1, 2], virtual_ids)


def test_every_salt_has_a_root_of_its_own_and_every_lora_one_under_each() -> None:
    roots = {root_key(salt) for salt in ("", "a", "b")}
    assert len(roots | {under_lora(root, lora) for root in roots for lora in ("a", "b", "sha256:a")}) == 12


def test_virtual_ids_count_by_digest_and_row_not_by_number() -> None:
    here, there = VirtualIds(100), VirtualIds(100)
    ids_here = here.assign("sha256:a", 4)
    there.assign("sha256:b", 4)
    ids_there = there.assign("sha256:a", 4)
    assert ids_here != ids_there
    root = root_key("")
    assert page_key(root, [7, *ids_here], here) == page_key(root, [7, *ids_there], there)
    assert page_key(root, list(ids_here), here) != page_key(root, list(there.ids("sha256:b")), there)
    assert page_key(root, list(ids_here[:2]), here) != page_key(root, list(ids_here[2:]), here)


_SIZES = {"sha256:a": 3, "sha256:b": 2, "sha256:c": 1}
_TOKENS = [0, 1, *((digest, row) for digest, size in _SIZES.items() for row in range(size))]
# Also as adapters give them: row behind row.
_PAGES = st.lists(
    st.sampled_from([_TOKENS[:1], _TOKENS[2:5], _TOKENS[5:], *([token] for token in _TOKENS)]), min_size=1
)


@settings(deadline=None)
@given(pages=st.tuples(_PAGES, _PAGES), order=st.permutations(list(_SIZES)))
def test_keys_are_equal_where_contents_are_and_nowhere_else(
    pages: tuple[list[list[int | tuple[str, int]]], ...], order: list[str]
) -> None:
    contents, keys = [], []
    for page, digests in zip(pages, (list(_SIZES), order), strict=True):
        virtual_ids = VirtualIds(100)
        for digest in digests:
            virtual_ids.assign(digest, _SIZES[digest])
        content = [token for run in page for token in run]
        ids = [t if isinstance(t, int) else virtual_ids.ids(t[0])[t[1]] for t in content]
        contents.append(content)
        keys.append(page_key(root_key(""), ids, virtual_ids))
    assert (keys[0] == keys[1]) == (contents[0] == contents[1])


def test_virtual_ids_are_never_given_twice() -> None:
    virtual_ids = VirtualIds(100)
    first = virtual_ids.assign("sha256:a", 3)
    second = virtual_ids.assign("sha256:b", 2)
    assert virtual_ids.retire("sha256:a") == first
    third = virtual_ids.assign("sha256:a", 3)
    assert [first.start, second.start, third.start] == [100, 103, 105]
    assert [virtual_ids.find(virtual_id)[1] for virtual_id in (104, 107)] == [second, third]
    assert virtual_ids.find(104)[0] != virtual_ids.find(107)[0]
    assert len(virtual_ids) == 2


def test_a_retired_virtual_id_stands_for_nothing() -> None:
    virtual_ids = VirtualIds(100)
    virtual_ids.assign("sha256:a", 3)
    second = virtual_ids.assign("sha256:b", 3)
    virtual_ids.retire("sha256:b")
    with pytest.raises(AssertionError):
        virtual_ids.find(second.start)
