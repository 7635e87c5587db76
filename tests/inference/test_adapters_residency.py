"""Adapters are brought in once, kept while used, dropped only when idle, and nobody waits without need."""

import asyncio
import contextlib
import math
import random
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from softprompt_api.errors import AdapterInUse, AdapterLoading, InvalidArgument, Overloaded, Unavailable
from softprompt_api.formats import Lora, LoraModule, Rows
from softprompt_inference.adapters import residency as residency_module
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import MakeWay
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.residency import Residency


def adapter(digest: str, num_rows: int = 1) -> Adapter:
    """Rows; of a digest that begins with "lora", a LoRA, and of one with "kv", keys and values."""
    if digest.startswith("lora"):
        module = LoraModule(
            name="q", rank=1, scale=1.0, in_features=1, out_features=1, a=bytes(4), b=bytes(4), dtype="float32"
        )
        return Adapter(digest=digest, spelling=f"{digest}@1", content=Lora(modules=(module,)))
    rows = Rows(
        data=bytes(4 * num_rows),
        dtype="float32",
        num_virtual_tokens=num_rows,
        row_size=1,
        are_key_values=digest.startswith("kv"),
    )
    return Adapter(digest=digest, content=rows)


@dataclass
class Edge:
    """The registry and the engine, as far as residency sees them."""

    num_rows: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    engine: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)  # the engine has told of them
    commands: list[str] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    now_s: float = 100.0

    async def fetch(self, digest: str, make_way: MakeWay) -> Adapter:
        if digest.startswith("large"):
            await make_way()
        self.fetched.append(digest)
        await self.gates.get(digest, _open()).wait()
        if digest in self.failures:
            raise self.failures.pop(digest)
        return adapter(digest, self.num_rows.get(digest, 1))

    def load(self, loaded: Adapter) -> None:
        assert loaded.digest not in self.engine
        self.engine.add(loaded.digest)
        self.failed.discard(loaded.digest)
        self.commands.append(f"load {loaded.digest}")

    def drop(self, digest: str) -> None:
        assert digest in self.engine or digest in self.failed
        self.engine.discard(digest)
        self.failed.discard(digest)
        self.commands.append(f"drop {digest}")


def _open() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


@pytest.fixture
def edge() -> Edge:
    return Edge()


@pytest.fixture
async def make(edge: Edge) -> AsyncIterator[Callable[..., Residency]]:
    made: list[Residency] = []

    def make(
        *,
        max_adapters: int = 2,
        max_rows: int = 100,
        max_key_value_rows: int = 100,
        max_loras: int = 2,
        host_bytes: int = 10_000,
        max_wait_s: float = math.inf,
    ) -> Residency:
        residency = Residency(
            fetch=edge.fetch,
            load=edge.load,
            drop=edge.drop,
            max_adapters=max_adapters,
            max_rows=max_rows,
            max_key_value_rows=max_key_value_rows,
            max_loras=max_loras,
            host_cache=HostCache(host_bytes),
            max_wait_s=max_wait_s,
            now=lambda: edge.now_s,
        )
        made.append(residency)
        return residency

    yield make
    for residency in made:
        residency.check()
        await residency.close()


class User:
    """A request that uses adapters until it is told to end."""

    def __init__(self, residency: Residency, *digests: str, tenant: str = "", num: int = 1) -> None:
        self._end = asyncio.Event()
        self.got = asyncio.Event()
        self.task = asyncio.create_task(self._run(residency, digests, tenant, num))

    async def _run(self, residency: Residency, digests: Sequence[str], tenant: str, num: int) -> None:
        async with residency.use(*digests, tenant=tenant, num=num) as held:
            assert [adapter.digest for adapter in held] == list(digests)
            self.got.set()
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def line_up(residency: Residency, wanted: Iterable[Sequence[str]], tenant: str = "") -> list[User]:
    """One user after the other, each with the digests that it wants."""
    users = []
    for digests in wanted:
        users.append(User(residency, *digests, tenant=tenant))
        await settle()
    return users


async def test_the_first_user_loads_and_later_ones_find_it_there(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make()
    for _ in range(3):
        async with residency.use("a"):
            residency.check()
    assert (edge.fetched, edge.commands) == (["a"], ["load a"])


async def test_users_at_the_same_time_share_one_fetch(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.gates["a"] = asyncio.Event()
    residency = make()
    users = [User(residency, "a") for _ in range(5)]
    await settle()
    assert not any(user.got.is_set() for user in users)
    edge.gates["a"].set()
    await settle()
    assert all(user.got.is_set() for user in users)
    assert edge.fetched == ["a"]
    for user in users:
        await user.end()


async def test_a_slow_fetch_blocks_nobody_else(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.gates["slow"] = asyncio.Event()
    residency = make()
    slow = User(residency, "slow")
    async with residency.use("quick"):
        assert not slow.got.is_set()
    edge.gates["slow"].set()
    await slow.end()


async def test_the_least_recently_used_idle_adapter_makes_room(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=2)
    for digest in ("a", "b", "a", "c"):
        async with residency.use(digest):
            residency.check()
    assert edge.commands == ["load a", "load b", "drop b", "load c"]


async def test_rows_bound_what_is_resident_too(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.num_rows = {"a": 6, "b": 3, "c": 4}
    residency = make(max_adapters=10, max_rows=10)
    for digest in ("a", "b", "c"):
        async with residency.use(digest):
            residency.check()
    assert edge.commands == ["load a", "load b", "drop a", "load c"]


async def test_an_adapter_in_use_is_never_dropped_and_others_wait_for_it(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1)
    first = User(residency, "a")
    await settle()
    second = User(residency, "b")
    await settle()
    residency.check()
    assert (first.got.is_set(), second.got.is_set()) == (True, False)
    assert edge.engine == {"a"}
    await first.end()
    await settle()
    assert second.got.is_set()
    assert edge.commands == ["load a", "drop a", "load b"]
    await second.end()


async def test_whoever_waits_for_room_in_an_engine_that_has_ended_is_told(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1)
    first = User(residency, "a")
    await settle()
    waiting = [User(residency, "b"), User(residency, "b"), User(residency, "c")]
    await settle()
    residency.refuse()
    for user in waiting:
        with pytest.raises(Unavailable, match="the engine has ended"):
            await user.task
    residency.check()
    await first.end()


async def test_while_others_wait_for_room_resident_adapters_are_used_at_once(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1)
    first = User(residency, "a")
    waiting = User(residency, "b")
    await settle()
    async with residency.use("a"):
        assert not waiting.got.is_set()
    await first.end()
    await settle()
    assert waiting.got.is_set()
    await waiting.end()


async def test_who_has_waited_long_for_room_is_before_newcomers_to_what_is_resident(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    """Clients in a closed loop that overlap would keep it from ever being idle."""
    residency = make(max_loras=1)
    looping = User(residency, "lora a")
    waiting = User(residency, "lora b")
    await settle()
    for _ in range(10):
        follower = User(residency, "lora a")
        await settle()
        assert follower.got.is_set() == (edge.now_s <= 102)
        edge.now_s += 0.25
        residency.check()
        if not follower.got.is_set():
            break
        await looping.end()
        looping = follower
    assert edge.now_s == 102.5
    beside = User(residency, "soft")  # there is room for it, and nobody else needs that
    await settle()
    assert beside.got.is_set()
    await looping.end()
    await settle()
    residency.check()
    assert (waiting.got.is_set(), follower.got.is_set(), edge.engine) == (True, False, {"lora b", "soft"})
    await waiting.end()
    await settle()
    assert (follower.got.is_set(), edge.engine) == (True, {"lora a", "soft"})
    await follower.end()
    await beside.end()


async def test_who_is_next_and_still_on_its_way_holds_up_nobody_who_uses_what_is_resident(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=2, host_bytes=0)
    holders = await line_up(residency, [("lora a",), ("lora b",)])
    coming_in, following, *later = await line_up(residency, [(f"lora {name}",) for name in "cdefgh"])
    edge.gates["lora d"] = asyncio.Event()  # its second fetch: of six that waited, five were kept
    await holders[0].end()
    await settle()
    assert edge.fetched[-1] == "lora d"
    edge.now_s += 60
    await coming_in.end()
    for digest in ("lora c", "lora b"):
        async with residency.use(digest):
            residency.check()
    assert edge.engine == {"lora b", "lora c"}
    # Once it is there, newcomers let it go first.
    looping = await line_up(residency, [("lora c",), ("lora b",)])
    edge.gates["lora d"].set()
    await settle()
    newcomer = User(residency, "lora c")
    await settle()
    residency.check()
    assert [user.got.is_set() for user in (*looping, following, newcomer)] == [True, True, False, False]
    await looping[0].end()
    await settle()
    assert following.got.is_set()
    for user in (holders[1], looping[1], following, *later, newcomer):
        await user.end()


async def test_a_lora_that_does_not_come_holds_up_no_soft_prompt(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, max_loras=1, host_bytes=0)
    holders = await line_up(residency, [("lora a",), ("a",)])
    edge.gates = {"lora c": asyncio.Event()}
    edge.gates["lora c"].set()
    loras = await line_up(residency, [("lora b",), ("lora c",)])
    soft_prompts = await line_up(residency, "bcdefg")
    edge.gates["lora c"].clear()
    await holders[0].end()
    await loras[0].end()
    await settle()
    assert edge.fetched[-1] == "lora c"
    await holders[1].end()
    for user in soft_prompts:  # some of them are fetched again
        await user.end()
    assert len(edge.fetched) > len(set(edge.fetched)) + 1
    edge.gates["lora c"].set()
    await loras[1].end()


async def test_keys_and_values_have_room_of_their_own(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.num_rows = {"kv a": 3, "kv b": 3, "a": 5}
    residency = make(max_adapters=2, max_rows=5, max_key_value_rows=4)
    holders = await line_up(residency, [("kv a",), ("a",)])
    [waiting] = await line_up(residency, [("kv b",)])
    assert edge.engine == {"kv a", "a"}
    await holders[1].end()
    await settle()
    assert not waiting.got.is_set()
    await holders[0].end()
    await settle()
    assert edge.engine == {"kv b", "a"}
    words = (
        "needs 2 soft prompts of keys and values with 6 virtual tokens at one time; there is room for 2 with 4 v"
    )
    with pytest.raises(InvalidArgument, match=words):
        async with residency.use("kv a", "kv b"):
            pass
    await waiting.end()


async def test_who_would_wait_too_long_for_room_is_told_when_to_come_back(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=1, max_wait_s=30.0)
    # While nothing is known of how long each takes, all are let in.
    users = await line_up(residency, [(f"lora {number}",) for number in range(10)])

    async def end(user: User) -> None:
        edge.now_s += 10
        await user.end()
        await settle()

    for user in users[:4]:
        await end(user)
    with pytest.raises(AdapterLoading, match="the wait would be about 50 s, and at most 30 s may be") as refused:
        async with residency.use("lora 10"):
            pass
    assert int(refused.value.details["retry_after_ms"]) == pytest.approx(20_000, abs=1)
    residency.check()
    async with residency.use(), residency.use("soft"):
        residency.check()
    resident = await line_up(residency, [("lora 4",)] * 20)
    assert not any(user.task.done() for user in resident)
    for user in users[4:7]:
        await end(user)
    assert users[7].got.is_set()
    last = User(residency, "lora 10")
    await settle()
    residency.check()
    assert not last.task.done()
    for user in (*users[7:], *resident, last):
        await user.end()


async def test_who_waited_for_who_is_next_alone_says_nothing_of_the_wait_for_room(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=1, max_wait_s=30.0)
    users = await line_up(residency, [("lora a",), ("lora b",), ("lora c",)])
    edge.now_s += 20
    await users[0].end()
    await settle()
    resident = await line_up(residency, [("lora b",)] * 50)
    await users[2].cancel()
    await settle()
    assert all(user.got.is_set() for user in resident)
    waiting = await line_up(residency, [("lora c",), ("lora d",)])
    with pytest.raises(AdapterLoading, match="about 40 s"):
        async with residency.use("lora e"):
            pass
    for user in (users[1], *resident, *waiting):
        await user.end()


async def test_tenants_have_room_in_turn(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=1, max_loras=1)
    holder = User(residency, "a", "lora a", tenant="noisy")
    await settle()
    noisy = await line_up(residency, [("b", "lora b"), ("c",), ("lora d",), ("e", "lora e")], tenant="noisy")
    quiet = await line_up(residency, [("lora q",), ("q", "lora q")], tenant="quiet")
    for user in (holder, noisy[0], quiet[0]):
        assert user.got.is_set()
        await user.end()
        await settle()
        residency.check()
    assert edge.engine == {"c", "lora q"}
    await noisy[1].end()
    await settle()
    residency.check()
    assert edge.engine == {"q", "lora q"}
    for user in (quiet[1], noisy[2], noisy[3]):
        await user.end()


async def test_tenants_fetch_in_turn(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=20)
    edge.gates = {str(number): asyncio.Event() for number in range(20)}
    noisy = await line_up(residency, [(digest,) for digest in edge.gates], tenant="noisy")
    quiet = User(residency, "quiet", tenant="quiet")
    await settle()
    edge.gates["0"].set()
    edge.gates["1"].set()
    await settle()
    assert edge.fetched == ["0", "1", "2", "3", "4", "quiet", "5"]
    assert quiet.got.is_set()
    for gate in edge.gates.values():
        gate.set()
    for user in (*noisy, quiet):
        await user.end()


async def test_completions_are_counted_while_their_adapters_are_on_their_way_or_in_line(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=1)
    edge.gates["lora a"] = asyncio.Event()
    first = User(residency, "lora a", num=2)
    await settle()
    assert residency.num_waiting == 2
    edge.gates["lora a"].set()
    await settle()
    assert residency.num_waiting == 0
    second = User(residency, "lora b", num=3)
    await settle()
    assert residency.num_waiting == 3
    await second.cancel()
    assert residency.num_waiting == 0
    await first.end()


async def test_two_adapters_in_endless_demand_for_one_place_have_it_in_turn(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=1)
    served: list[str] = []
    is_over = False

    async def client(digest: str) -> None:
        while not is_over:
            async with residency.use(digest):
                for _ in range(3):
                    await asyncio.sleep(0)
                served.append(digest)

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(client("lora a" if number % 2 else "lora b"))
            await asyncio.sleep(0)
        for _ in range(300):
            edge.now_s += 0.25
            await asyncio.sleep(0)
            residency.check()
        is_over = True
    assert min(served.count("lora a"), served.count("lora b")) > len(served) / 4
    assert edge.commands.count("load lora a") > 3


async def test_those_who_wait_for_room_get_it_in_order(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.num_rows = {"large": 10}
    residency = make(max_adapters=2, max_rows=10)
    holder = User(residency, "a")
    await settle()
    large = User(residency, "large")
    await settle()
    small = User(residency, "b")
    await settle()
    residency.check()
    assert not small.got.is_set()  # it would fit, but would starve the one before it
    await holder.end()
    await settle()
    assert (large.got.is_set(), small.got.is_set()) == (True, False)
    await large.end()
    await small.end()


async def test_the_least_recently_used_idle_lora_makes_room_for_another(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=2)
    for digest in ("lora a", "soft", "lora b", "lora a", "lora c"):
        async with residency.use(digest):
            residency.check()
    assert edge.commands == ["load lora a", "load soft", "load lora b", "drop lora b", "load lora c"]


async def test_loras_wait_for_each_other_in_order_and_never_for_soft_prompts_nor_they_for_loras(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, max_loras=1)
    users = {digest: User(residency, digest) for digest in ("lora a", "soft a")}
    await settle()
    users |= {digest: User(residency, digest) for digest in ("lora b", "soft b", "lora c")}
    await settle()
    residency.check()
    assert edge.engine == {"lora a", "soft a"}
    await users["soft a"].end()
    await settle()
    residency.check()
    assert edge.engine == {"lora a", "soft b"}
    assert residency.loras_asked_for() == (["lora a"], ["lora b", "lora c"])
    for ended, waiting in (("lora a", "lora b"), ("lora b", "lora c")):
        assert not users[waiting].got.is_set()
        await users[ended].end()
        await settle()
        residency.check()
        assert edge.engine == {waiting, "soft b"}
    for last in ("soft b", "lora c"):
        await users[last].end()


async def test_two_requests_that_each_need_two_adapters_never_wait_for_each_other(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    """Room for exactly two: whoever held one and waited for the other would wait for ever."""
    residency = make(max_adapters=2)
    pairs = ({"a", "b"}, {"c", "d"}, {"b", "c"})
    crossing = []
    for pair in pairs:
        crossing.append(User(residency, *sorted(pair)))
        await settle()
    for user, engine in zip(crossing, pairs, strict=True):
        await settle()
        residency.check()
        assert user.got.is_set()
        assert edge.engine == engine
        await user.end()
    assert edge.commands[:6] == ["load a", "load b", "drop a", "drop b", "load c", "load d"]


async def test_a_request_that_waits_holds_nothing_also_not_what_is_resident(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=2)
    async with residency.use("a", "b"):
        pass
    holder = User(residency, "c")  # in the place of a
    await settle()
    waiting = []
    for pair in (("b", "d"), ("a", "b")):
        waiting.append(User(residency, *pair))
        await settle()
    other = User(residency, "b")
    await settle()
    residency.check()
    assert [user.got.is_set() for user in (*waiting, other)] == [False, False, True]
    await other.end()
    await settle()
    await holder.end()
    await settle()
    assert waiting[0].got.is_set()
    assert edge.engine == {"b", "d"}
    await waiting[0].end()
    await settle()
    assert edge.engine == {"a", "b"}
    await waiting[1].end()


async def test_a_soft_prompt_and_a_lora_are_taken_together_and_in_one_order_with_all_others(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, max_loras=1)
    first = User(residency, "a", "lora x")
    await settle()
    crossing = [User(residency, "b", "lora x"), User(residency, "lora y", "a")]
    later = [User(residency, "c"), User(residency, "lora z")]
    await settle()
    residency.check()
    assert not any(user.got.is_set() for user in (*crossing, *later))
    await first.end()
    await settle()
    assert edge.engine == {"b", "lora x"}
    await crossing[0].end()
    await settle()
    residency.check()
    assert crossing[1].got.is_set()
    assert not any(user.got.is_set() for user in later)
    await crossing[1].end()
    await settle()
    assert all(user.got.is_set() for user in later)
    for user in later:
        await user.end()


async def test_who_waits_for_what_another_has_brought_in_need_not_wait_for_those_before_it(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.num_rows = {"large": 9}
    residency = make(max_adapters=2, max_rows=10)
    holder = User(residency, "large")
    await settle()
    bringing, blocked, same = User(residency, "a", "b"), User(residency, "c", "d"), User(residency, "b")
    await settle()
    residency.check()
    assert not any(user.got.is_set() for user in (bringing, blocked, same))
    await holder.end()
    await settle()
    residency.check()
    assert [user.got.is_set() for user in (bringing, blocked, same)] == [True, False, True]
    await bringing.end()
    await settle()
    assert not blocked.got.is_set()  # b is in use
    await same.end()
    await settle()
    assert blocked.got.is_set()
    await blocked.end()


async def test_also_what_another_has_brought_in_is_not_used_before_who_has_waited_too_long(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.num_rows = {"large": 9}
    residency = make(max_adapters=2, max_rows=10)
    holder = User(residency, "large")
    await settle()
    bringing, blocked, same = await line_up(residency, ("ab", "cd", "b"))
    edge.now_s += 3
    await holder.end()
    await settle()
    residency.check()
    assert [user.got.is_set() for user in (bringing, blocked, same)] == [True, False, False]
    await bringing.end()
    await settle()
    residency.check()
    assert [user.got.is_set() for user in (blocked, same)] == [True, False]
    await blocked.end()
    await same.end()


async def test_who_waited_behind_one_that_leaves_or_comes_in_passes_at_once(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=2)
    first, second = User(residency, "a"), User(residency, "b")
    await settle()
    waiting = User(residency, "c", "d")
    await settle()
    edge.now_s += 3
    newcomers = [User(residency, "e"), User(residency, "a"), User(residency, "b")]
    await settle()
    residency.check()
    assert not any(user.got.is_set() for user in newcomers)
    await waiting.cancel()
    await settle()
    residency.check()
    assert [user.got.is_set() for user in newcomers] == [False, True, True]
    for user in (first, second, *newcomers[1:], newcomers[0]):
        await user.end()


async def test_idle_adapters_stay_as_long_as_their_leaving_would_not_help(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=3)
    async with residency.use("idle"):
        pass
    holders = [User(residency, "a"), User(residency, "b")]
    await settle()
    waiting = User(residency, "c", "d")
    await settle()
    assert edge.engine == {"idle", "a", "b"}
    async with residency.use("idle"):
        residency.check()
    await holders[0].end()
    await settle()
    assert edge.engine == {"b", "c", "d"}
    for user in (holders[1], waiting):
        await user.end()


async def test_an_adapter_that_is_named_twice_takes_room_once(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=1)
    user = User(residency, "a", "a")
    await settle()
    assert user.got.is_set()
    assert edge.commands == ["load a"]
    await user.end()


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        (("a", "b", "c"), "needs 3 soft prompts with 3 virtual tokens at one time; there is room for 2 with 100"),
        (("a", "large"), "needs 2 soft prompts with 101 virtual tokens at one time"),
        (("a", "lora x", "lora y", "lora z"), "needs 3 LoRAs at one time; there is room for 2"),
    ],
)
async def test_what_can_never_fit_together_is_refused_and_waits_for_nobody(
    edge: Edge, make: Callable[..., Residency], digests: Sequence[str], message: str
) -> None:
    edge.num_rows = {"large": 100}
    residency = make()
    with pytest.raises(InvalidArgument, match=message) as refused:
        async with residency.use(*digests):
            pass
    assert refused.value.field == "adapter"
    residency.check()
    assert edge.commands == []


async def test_what_a_check_refuses_takes_no_room(edge: Edge, make: Callable[..., Residency]) -> None:
    def refuse(adapters: Sequence[Adapter]) -> None:
        assert [adapter.digest for adapter in adapters] == ["a", "b"]
        raise InvalidArgument("they do not go together")

    residency = make(max_adapters=1)
    with pytest.raises(InvalidArgument, match="do not go together"):
        async with residency.use("a", "b", check=refuse):
            pass
    residency.check()
    assert edge.commands == []


async def test_one_fetch_that_fails_fails_the_request_and_leaves_its_other_adapters_alone(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.failures["bad"] = Unavailable("the registry is away")
    residency = make()
    good = User(residency, "good")
    with pytest.raises(Unavailable):
        async with residency.use("good", "bad"):
            pass
    await settle()
    residency.check()
    assert good.got.is_set()
    await good.end()
    async with residency.use("good", "bad"):
        assert edge.engine == {"good", "bad"}


async def test_a_failed_fetch_reaches_its_waiters_and_is_not_remembered(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.failures["a"] = Unavailable("the registry is away")
    residency = make()
    users = [User(residency, "a") for _ in range(3)]
    results = await asyncio.gather(*(user.task for user in users), return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    async with residency.use("a"):
        assert edge.fetched == ["a", "a"]


async def test_a_failed_fetch_does_not_touch_others(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.failures["bad"] = Unavailable("the registry is away")
    residency = make(max_adapters=1)
    with pytest.raises(Unavailable):
        async with residency.use("bad"):
            pass
    async with residency.use("good"):
        residency.check()


async def test_an_engine_that_refuses_a_load_leaves_the_room_free(edge: Edge) -> None:
    def refuse(_: Adapter) -> None:
        raise Unavailable("the engine has stopped")

    residency = Residency(
        fetch=edge.fetch,
        load=refuse,
        drop=edge.drop,
        max_adapters=1,
        max_rows=9,
        max_key_value_rows=9,
        max_loras=1,
        host_cache=HostCache(0),
    )
    for _ in range(2):
        with pytest.raises(Unavailable):
            async with residency.use("a"):
                pass
        residency.check()


async def test_one_waiter_that_leaves_does_not_end_the_fetch_of_others(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.gates["a"] = asyncio.Event()
    residency = make()
    leaver, stayer = User(residency, "a"), User(residency, "a")
    await settle()
    await leaver.cancel()
    edge.gates["a"].set()
    await settle()
    assert stayer.got.is_set()
    assert edge.fetched == ["a"]
    await stayer.end()


async def test_a_fetch_that_nobody_waits_for_ends(edge: Edge, make: Callable[..., Residency]) -> None:
    edge.gates["a"] = asyncio.Event()
    residency = make()
    leaver = User(residency, "a")
    await settle()
    await leaver.cancel()
    edge.gates["a"].set()
    await settle()
    assert edge.commands == []
    async with residency.use("a"):
        assert edge.fetched == ["a", "a"]


async def test_a_waiter_for_room_that_leaves_lets_the_next_one_in(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.num_rows = {"large": 10}
    residency = make(max_adapters=2, max_rows=10)
    holder = User(residency, "a")
    await settle()
    large = User(residency, "large")
    await settle()
    small = User(residency, "b")
    await settle()
    await large.cancel()
    await settle()
    assert small.got.is_set()
    await small.end()
    await holder.end()


async def test_a_dropped_adapter_comes_back_from_host_memory(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=1)
    for digest in ("a", "b", "a"):
        async with residency.use(digest):
            pass
    assert edge.fetched == ["a", "b"]
    assert edge.commands == ["load a", "drop a", "load b", "drop b", "load a"]


async def test_without_host_memory_a_dropped_adapter_is_fetched_again(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, host_bytes=0)
    for digest in ("a", "b", "a"):
        async with residency.use(digest):
            pass
    assert edge.fetched == ["a", "b", "a"]


async def test_few_adapters_are_fetched_at_one_time(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=20)
    edge.gates = {str(number): asyncio.Event() for number in range(20)}
    users = [User(residency, digest) for digest in edge.gates for _ in range(2)]
    await settle()
    assert edge.fetched == ["0", "1", "2", "3"]
    await users[0].cancel()
    edge.gates["2"].set()
    await settle()
    assert edge.fetched == ["0", "1", "2", "3", "4"]
    await users[1].cancel()  # nobody waits for it any more
    await settle()
    assert edge.fetched[5:] == ["5"]
    for gate in edge.gates.values():
        gate.set()
    for user in users[2:]:
        await user.end()
    assert edge.fetched == list(edge.gates)


async def test_small_adapters_do_not_wait_for_large_ones_that_come_in_slowly(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=20)
    edge.gates = {f"large {number}": asyncio.Event() for number in range(6)}
    large = await line_up(residency, [(digest,) for digest in edge.gates], tenant="noisy")
    async with residency.use("small"):
        assert edge.fetched == ["large 0", "large 1", "large 2", "large 3", "small"]
    quiet = User(residency, "large", tenant="quiet")
    await settle()
    await large[4].cancel()
    edge.gates["large 1"].set()
    edge.gates["large 3"].set()
    await settle()
    # In turn among themselves.
    assert edge.fetched[5:] == ["large", "large 5"]
    for gate in edge.gates.values():
        gate.set()
    for user in (*large[:4], large[5], quiet):
        await user.end()
    assert len(edge.fetched) == len(set(edge.fetched))


class Tracked(Adapter):
    """An adapter whose end can be seen."""

    __slots__ = ("__weakref__",)


async def test_host_memory_is_bounded_however_many_wait_for_room_and_who_is_next_is_fetched_again(
    edge: Edge, make: Callable[..., Residency], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Adapter]] = []

    async def fetch(digest: str, make_way: MakeWay) -> Adapter:
        fetched = await Edge.fetch(edge, digest, make_way)
        tracked = Tracked(digest=fetched.digest, content=fetched.content)
        made.append(weakref.ref(tracked))
        return tracked

    monkeypatch.setattr(edge, "fetch", fetch)
    residency = make(max_adapters=1, host_bytes=8)
    users = [User(residency, str(number // 2)) for number in range(100)]
    for number, user in enumerate(users):
        await settle()
        residency.check()
        assert user.got.is_set()
        alive = sum(ref() is not None for ref in made)
        # The cache's two, four that were fetched last, and the next in line's.
        assert alive <= 7
        assert residency.tiers()[1].num_adapters == alive
        assert residency.tiers()[1].size_bytes == 4 * alive
        assert edge.engine == {str(number // 2)}
        await user.end()
    counts = Counter(edge.fetched)
    assert len(counts) == 50
    assert max(counts.values()) == 2
    assert edge.commands.count("load 49") == 1


async def test_an_adapter_that_is_fetched_again_in_vain_fails_all_who_wait_for_it_and_nobody_else(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, host_bytes=0)
    holder = User(residency, "a")
    await settle()
    users = await line_up(residency, "bccdefgh")
    assert edge.fetched == list("abcdefgh")
    edge.failures["c"] = Unavailable("the registry is away")
    await holder.end()
    await settle()
    for user in users[1:3]:
        with pytest.raises(Unavailable):
            await user.task
    residency.check()
    assert edge.engine == {"b"}
    for user in (users[0], *users[3:]):
        await user.end()
    async with residency.use("c"):
        assert edge.fetched.count("c") == 3


async def test_who_is_next_is_not_held_up_by_the_fetches_of_all_who_came_later(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, host_bytes=0)
    holder = User(residency, "a")
    await settle()
    users = await line_up(residency, "bcdefg")
    edge.gates = {str(number): asyncio.Event() for number in range(10)}
    later = [User(residency, digest) for digest in edge.gates]
    await settle()
    await holder.end()
    await users[0].end()
    await users[1].end()  # c, of which nothing was left in memory
    for user in (*users[2:], *later):
        await user.cancel()


async def test_what_the_engine_failed_to_load_is_loaded_anew_for_the_next_request(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1, host_bytes=0)
    for digest in ("lora a", "a"):
        first = User(residency, digest)
        await settle()
        edge.engine.remove(digest)
        residency.load_failed(digest)
        residency.check()
        assert residency.tiers()[0].num_adapters == 0
        assert residency.resident() == []
        second = User(residency, digest)  # beside the first, which is told by the engine
        await settle()
        residency.check()
        assert second.got.is_set()
        await first.end()
        await second.end()
        assert edge.fetched.count(digest) == edge.commands.count(f"load {digest}") == 2
        async with residency.use(digest):
            assert edge.commands.count(f"load {digest}") == 2
        assert residency.evict(digest)
    residency.load_failed("never")


async def test_what_the_engine_failed_to_load_makes_room_like_any_other(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1)
    async with residency.use("a"):
        waiting = User(residency, "b", "lora a")
        await settle()
        residency.load_failed("a")
        residency.check()
        both = User(residency, "a", "lora a")
        await settle()
        assert not waiting.got.is_set()
    await settle()
    residency.check()
    assert edge.commands == ["load a", "drop a", "load b", "load lora a"]
    await waiting.end()
    await both.end()


async def test_what_is_in_memory_is_listed_with_its_use(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=1)
    assert residency.resident() == []
    for _ in range(3):
        async with residency.use("a"):
            pass
    edge.now_s += 5
    async with residency.use("b"):
        [b, a] = residency.resident()
        assert (b.adapter.digest, b.tier, b.hits, b.users, b.idle_s) == ("b", "device", 1, 1, 0)
        assert (a.adapter.digest, a.tier, a.hits, a.users, a.idle_s) == ("a", "host", 3, 0, 5)
    edge.now_s += 2
    assert [one.idle_s for one in residency.resident()] == [2, 7]
    async with residency.use("a"):
        assert [(one.adapter.digest, one.tier) for one in residency.resident()] == [("a", "device"), ("b", "host")]
        assert [one.adapter.digest for one in residency.resident(limit=1)] == ["a"]


async def test_each_tier_tells_what_it_holds_and_how_often_it_was_enough(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.num_rows = {"a": 3, "b": 5}
    residency = make(max_adapters=1)
    for digest in "aaba":  # from the registry, on the device, from the registry, in host memory
        async with residency.use(digest):
            residency.check()
    [device, host] = residency.tiers()
    assert (device.name, device.num_adapters, device.size_bytes, device.hits) == ("device", 1, 12, 1)
    assert (host.name, host.num_adapters, host.size_bytes, host.hits) == ("host", 2, 32, 1)
    assert residency.misses == 2
    assert residency.num_resident == 2
    assert [one.adapter.digest for one in residency.resident(1)] == ["a"]
    residency.evict("a")
    assert (residency.tiers()[0].size_bytes, residency.num_resident) == (0, 1)


async def test_memory_is_bounded_however_many_adapters_are_asked_for(
    edge: Edge, make: Callable[..., Residency], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_MAX_REMEMBERED", 50)
    residency = make(max_adapters=3, max_rows=3, host_bytes=40)
    for number in range(1000):
        async with residency.use(str(number)):
            assert len(edge.engine) <= 3
    residency.check()
    [device, host] = residency.tiers()
    assert (device.num_adapters, host.num_adapters, host.size_bytes) == (3, 10, 40)
    assert residency.num_resident == len(residency.resident()) == 10
    assert len(residency._usage) == 50


async def test_many_more_adapters_than_places_wait_their_turn_and_all_end(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=2, host_bytes=0)
    served: list[str] = []

    async def request(digest: str) -> None:
        async with residency.use(digest):
            assert digest in edge.engine
            await asyncio.sleep(0)
            served.append(digest)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number in range(300):
            group.create_task(request(str(number % 100)))
    assert sorted(served) == sorted(str(number % 100) for number in range(300))


async def test_an_evicted_adapter_is_gone_from_all_memory_and_comes_back(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=1)
    for digest in "ab":
        async with residency.use(digest):
            pass
    assert residency.evict("b")  # on the device
    assert residency.evict("a")  # in host memory
    residency.check()
    assert (edge.engine, residency.resident()) == (set(), [])
    assert not residency.evict("a")
    async with residency.use("b"):
        assert edge.engine == {"b"}
    assert edge.fetched == ["a", "b", "b"]


async def test_an_adapter_in_use_is_not_evicted(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make()
    edge.gates["a"] = asyncio.Event()
    user = User(residency, "a")
    await settle()
    with pytest.raises(AdapterInUse):  # it is on its way
        residency.evict("a")
    edge.gates["a"].set()
    await user.got.wait()
    with pytest.raises(AdapterInUse):
        residency.evict("a")
    assert edge.engine == {"a"}
    await user.end()
    assert residency.evict("a")
    assert edge.engine == set()


async def test_a_pinned_adapter_stays_until_it_is_evicted(edge: Edge, make: Callable[..., Residency]) -> None:
    residency = make(max_adapters=2, host_bytes=0)
    async with residency.use("a"):
        residency.pin("a")
        residency.pin("a")
    for digest in "bcbc":
        async with residency.use(digest):
            assert edge.engine == {"a", digest}
            residency.check()
    assert {one.adapter.digest: one.is_pinned for one in residency.resident()} == {"a": True, "c": False}
    assert residency.evict("a")
    assert edge.engine == {"c"}
    async with residency.use("a"), residency.use("b"):
        assert not any(one.is_pinned for one in residency.resident())


async def test_a_pinned_adapter_that_is_in_use_is_pinned_no_longer_when_it_was_to_be_evicted(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=2)
    user = User(residency, "lora a")
    await settle()
    residency.pin("lora a")
    with pytest.raises(AdapterInUse):
        residency.evict("lora a")
    await user.end()
    async with residency.use("lora b", "lora c"):
        assert edge.engine == {"lora b", "lora c"}


async def test_who_waits_for_room_has_that_of_a_pinned_adapter_once_it_is_evicted(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_loras=2)
    async with residency.use("lora a"):
        residency.pin("lora a")
    holder = User(residency, "lora b")
    await settle()
    waiting = User(residency, "lora c")
    await settle()
    assert not waiting.got.is_set()
    assert residency.evict("lora a")
    await settle()
    residency.check()
    assert waiting.got.is_set()
    await holder.end()
    await waiting.end()


async def test_some_room_is_left_for_others_than_what_is_pinned(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    edge.num_rows = {"large": 9, "small": 3}
    residency = make(max_adapters=3, max_rows=10, max_loras=2)
    async with residency.use("large"):
        residency.pin("large")
    async with residency.use("a"):
        with pytest.raises(
            Overloaded,
            match="1 soft prompts with 9 virtual tokens are pinned, and at most 2 with 9 virtual tokens",
        ):
            residency.pin("a")
    async with residency.use("lora a", "lora b"):
        residency.pin("lora a")
        with pytest.raises(Overloaded, match="1 LoRAs are pinned, and at most 1 may be; evict one"):
            residency.pin("lora b")
    residency.check()
    for digests, message in (
        (
            ("small",),
            "with 3 virtual tokens at one time; there is room for 2 with 1 virtual tokens beside 1 pinned",
        ),
        (("lora b", "lora c"), r"needs 2 LoRAs at one time; there is room for 1 beside 1 pinned \(max_loras\)"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            async with residency.use(*digests):
                pass
    async with residency.use("lora a", "lora b", "large", "a"):
        residency.check()


async def test_who_waits_for_more_than_a_pinned_adapter_leaves_is_told_and_holds_up_nobody(
    edge: Edge, make: Callable[..., Residency]
) -> None:
    residency = make(max_adapters=2)
    holders = await line_up(residency, "ab")
    waiting = await line_up(residency, ["cd", "e", "ac", "c"])
    residency.pin("a")
    with pytest.raises(InvalidArgument, match="there is room for 1 with 99 virtual tokens beside 1 pinned"):
        await waiting[0].task
    residency.check()
    await holders[1].end()
    for user in (*waiting[1:], holders[0]):
        await user.end()


@pytest.mark.parametrize("seed", range(20))
async def test_a_storm_of_users_and_cancellations_keeps_every_invariant(
    edge: Edge, make: Callable[..., Residency], seed: int
) -> None:
    draw = random.Random(seed)
    digests = [("", "lora ", "kv ")[number % 3] + str(number) for number in range(12)]
    edge.num_rows = {digest: 1 + number % 5 for number, digest in enumerate(digests)}
    residency = make(max_adapters=2, max_rows=7, max_key_value_rows=6, max_loras=2, host_bytes=20)
    in_use: list[str] = []

    async def user(*wanted: str) -> None:
        if draw.random() < 0.1:
            edge.failures[wanted[0]] = Unavailable("the registry is away")
        async with residency.use(*wanted, tenant=draw.choice("abc")):
            in_use.extend(wanted)
            if draw.random() < 0.05:
                with contextlib.suppress(Overloaded):
                    residency.pin(wanted[0])
            try:
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
                    assert set(wanted) <= edge.engine | edge.failed
            finally:
                for digest in wanted:
                    in_use.remove(digest)

    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        edge.now_s += draw.random() / 4
        if edge.engine and draw.random() < 0.05:
            failed = draw.choice(sorted(edge.engine))
            edge.engine.remove(failed)
            edge.failed.add(failed)
            residency.load_failed(failed)
        if draw.random() < 0.1:
            with contextlib.suppress(AdapterInUse):
                residency.evict(draw.choice(digests))
        # Some are too many or too large together, and refused.
        tasks.append(asyncio.create_task(user(*draw.sample(digests, draw.choice([1, 1, 2, 3])))))
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
        if draw.random() < 0.7:
            await asyncio.sleep(0)
        residency.check()
        assert set(in_use) <= edge.engine | edge.failed
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(
        isinstance(result, Unavailable | InvalidArgument | asyncio.CancelledError | None) for result in results
    )
    await settle()
    residency.check()
    edge.failures.clear()
    for digest in digests:
        residency.evict(digest)
    async with asyncio.timeout(5), residency.use("kv 11", "0", "lora 1"):
        residency.check()
