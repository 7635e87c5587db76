"""Host memory holds the adapters used last, within its limit."""

import random

from softprompt_api.formats import Rows
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.host_cache import HostCache


def adapter(digest: str, size_bytes: int) -> Adapter:
    rows = Rows(data=bytes(size_bytes), dtype="float32", num_virtual_tokens=1, row_size=1)
    return Adapter(digest=digest, content=rows)


def test_what_was_put_is_found_and_nothing_else() -> None:
    cache = HostCache(10)
    kept = adapter("a", 4)
    cache.put(kept)
    assert cache.get("a") is kept
    assert cache.get("b") is None


def test_what_was_discarded_is_forgotten() -> None:
    cache = HostCache(10)
    for digest in "ab":
        cache.put(adapter(digest, 5))
    assert cache.discard("a")
    assert not cache.discard("a")
    cache.check()
    assert list(cache.digests()) == ["b"]
    cache.put(adapter("c", 5))
    assert cache.size_bytes == 10


def test_the_least_recently_used_is_forgotten() -> None:
    cache = HostCache(10)
    cache.put(adapter("a", 5))
    cache.put(adapter("b", 5))
    cache.get("a")
    cache.put(adapter("c", 5))
    assert [digest for digest in "abc" if cache.get(digest)] == ["a", "c"]


def test_an_adapter_larger_than_the_cache_is_not_kept_and_pushes_nobody_out() -> None:
    cache = HostCache(10)
    cache.put(adapter("a", 5))
    cache.put(adapter("b", 11))
    assert [digest for digest in "ab" if cache.get(digest)] == ["a"]


def test_what_is_in_hand_stays_whatever_its_size_until_it_is_handed_out() -> None:
    cache = HostCache(10)
    large = adapter("large", 11)
    cache.hold(large)
    cache.put(adapter("a", 6))
    assert cache.take_up("a")
    cache.put(adapter("b", 6))  # in the place of a
    assert not cache.take_up("c")
    cache.check()
    assert (len(cache), cache.size_bytes, list(cache.digests())) == (3, 23, ["large", "a", "b"])
    assert cache.get("large") is cache.peek("large") is large
    assert cache.hand_out("large") is large
    cache.let_go("a")
    cache.let_go("never")
    assert (len(cache), cache.size_bytes, "large" in cache, "a" in cache) == (1, 6, False, False)


def test_what_is_in_hand_and_within_the_limit_counts_once() -> None:
    cache = HostCache(10)
    cache.put(adapter("a", 6))
    assert cache.take_up("a")
    assert (len(cache), cache.size_bytes, list(cache.digests())) == (1, 6, ["a"])
    cache.let_go("a")
    assert cache.get("a") is not None


def test_of_what_is_in_hand_the_last_few_stay_beside_what_is_wanted() -> None:
    cache = HostCache(0)
    for digest in "abcd":
        cache.hold(adapter(digest, 1))
    cache.let_go_but({"a"}, num_others=2)
    assert list(cache.in_hand()) == ["a", "c", "d"]
    cache.let_go_but({"d"}, num_others=5)
    assert list(cache.in_hand()) == ["a", "c", "d"]
    cache.let_go_but((), num_others=0)
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_the_counters_stay_right_over_many_operations() -> None:
    draw, cache = random.Random(1), HostCache(100)
    for _ in range(1000):
        digest = str(draw.randrange(30))
        if draw.random() < 0.5:
            cache.get(digest)
        else:
            cache.put(adapter(digest, draw.randrange(40)))
        cache.check()
    assert 0 < cache.size_bytes <= 100
