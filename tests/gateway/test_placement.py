"""Which replica takes a request: the same for each key, few moves when replicas come and go, and bounded loads."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_gateway.placement import BALANCE, Place, order, rank

NAMES = [f"10.0.0.{number}:2244" for number in range(1, 9)]
keys = st.binary(max_size=40)
names = st.sets(st.text(max_size=12), min_size=1, max_size=8)


@given(key=keys, replicas=names)
def test_a_key_has_one_order_however_replicas_are_told(key: bytes, replicas: set[str]) -> None:
    told = sorted(replicas)
    assert order(key, told) == order(key, reversed(told))
    assert sorted(order(key, told)) == told


@given(key=keys, replicas=names, left=st.data())
def test_when_a_replica_leaves_all_others_keep_their_order(
    key: bytes, replicas: set[str], left: st.DataObject
) -> None:
    gone = left.draw(st.sampled_from(sorted(replicas)))
    assert order(key, replicas - {gone}) == [name for name in order(key, replicas) if name != gone]


def test_keys_are_spread_over_all_replicas() -> None:
    firsts = Counter(order(f"sha256:{number:064x}".encode(), NAMES)[0] for number in range(8000))
    # Binomial, 1000 each: six standard deviations are 177.
    assert all(823 <= firsts[name] <= 1177 for name in NAMES)


def test_an_order_is_the_same_in_every_process() -> None:
    assert order(b"sha256:ab", NAMES[:4]) == [NAMES[number] for number in (3, 1, 2, 0)]


@given(key=keys, loads=st.dictionaries(st.text(max_size=8), st.integers(0, 1000), min_size=1, max_size=8))
def test_all_are_ranked_and_the_first_is_below_the_bound(key: bytes, loads: dict[str, int]) -> None:
    ranked = rank(key, loads)
    assert sorted(ranked) == sorted(loads)
    assert loads[ranked[0]] < math.ceil(BALANCE * (sum(loads.values()) + 1) / len(loads))


@given(key=keys, loads=st.dictionaries(st.text(max_size=8), st.just(3), min_size=1, max_size=8))
def test_equal_loads_leave_the_order_as_it_is(key: bytes, loads: dict[str, int]) -> None:
    assert rank(key, loads) == order(key, loads)


@given(
    placed=st.lists(st.tuples(st.sampled_from([b"hot", b"warm", b"cold"]), st.integers(1, 16)), max_size=60),
    replicas=st.integers(1, 8),
)
def test_no_replica_takes_more_than_its_share_and_one_request(
    placed: list[tuple[bytes, int]], replicas: int
) -> None:
    loads = dict.fromkeys(NAMES[:replicas], 0)
    for key, adds in placed:
        loads[rank(key, loads, adds=adds)[0]] += adds
    if placed:
        largest = max(adds for _, adds in placed)
        assert max(loads.values()) <= math.ceil(BALANCE * sum(loads.values()) / replicas) + largest - 1


def test_a_hot_key_spreads_to_as_many_replicas_as_it_needs_in_its_own_order() -> None:
    loads = dict.fromkeys(NAMES, 0)
    taken = []
    for _ in range(40):
        first = rank(b"hot", loads)[0]
        loads[first] += 1
        taken.append(first)
    assert list(dict.fromkeys(taken)) == order(b"hot", NAMES)[: len(set(taken))]
    assert max(loads.values()) <= math.ceil(BALANCE * 40 / 8)


def place(digest: str = "") -> Place:
    return Place(served=pb.GetModelResponse(), digest=digest)


def test_requests_with_an_adapter_are_placed_by_it() -> None:
    one, another = pb.GenerateRequest(text="a"), pb.GenerateRequest(text="b")
    assert place("sha256:ab").key(one) == place("sha256:ab").key(another) != place("sha256:cd").key(one)


LONG = "x" * 300


def chat(*contents: str) -> pb.ChatPrompt:
    return pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=content) for content in contents])


@pytest.mark.parametrize(
    ("alike", "different"),
    [
        (
            [pb.GenerateRequest(text=f"{LONG}a"), pb.GenerateRequest(text=f"{LONG}b")],
            [pb.GenerateRequest(text=f"a{LONG}"), pb.GenerateRequest(text=LONG, cache_salt="t")],
        ),
        (
            [pb.GenerateRequest(chat=chat("s", "q")), pb.GenerateRequest(chat=chat("s", "q", "a", "q2"))],
            [pb.GenerateRequest(chat=chat("s", "other")), pb.GenerateRequest(chat=chat("other", "q"))],
        ),
        (
            [pb.GenerateRequest(token_ids=pb.TokenIds(ids=[*range(64), end])) for end in (1, 2)],
            [pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, *range(64)]))],
        ),
        (
            [pb.TokenizeRequest(text=f"{LONG}a"), pb.TokenizeRequest(text=f"{LONG}b")],
            [pb.TokenizeRequest(parts=pb.PromptParts(parts=[pb.PromptPart(text="a")]))],
        ),
    ],
)
def test_requests_without_one_are_placed_by_how_they_begin(
    alike: list[pb.GenerateRequest], different: list[pb.GenerateRequest]
) -> None:
    first = {place().key(request) for request in alike}
    assert len(first) == 1
    assert first.isdisjoint({place().key(request) for request in different})


def test_a_turn_of_a_conversation_goes_where_the_one_before_went() -> None:
    turns = [chat("s", "q", *rest) for rest in ([], ["a", "q2"], ["a", "q2", "b", "q3"])]
    firsts = [order(place().key(pb.GenerateRequest(chat=turn)), NAMES)[0] for turn in turns]
    assert all(one == other for one, other in pairwise(firsts))
