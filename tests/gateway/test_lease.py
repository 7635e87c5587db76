"""While the registry's lease is held, names are not asked for; otherwise they are."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from softprompt_api.errors import Unavailable
from softprompt_gateway import lease as lease_module
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import RegistryClient
from softprompt_gateway.disconnect import stop
from softprompt_gateway.lease import Lease

DIGEST = "x-softprompt-adapter-digest"


@pytest.fixture
def lease_s() -> float:
    return 60.0


@pytest.fixture
async def leased(stack: Any, lease_s: float) -> Any:
    """The stack, whose gateway has heard of `loud@1` and holds a lease."""
    await stack.registry.add("loud")
    await stack.until_listed("loud")
    stack.registry.lease_s = lease_s
    await stack.complete("hi", model="loud")  # which uses the lease
    await stack.registry.until(lambda fake: fake.leases)
    await _until_not_asked(stack, "loud")
    return stack


async def _until_not_asked(stack: Any, model: str) -> str:
    """The digest that answers once nobody is asked for it."""
    async with asyncio.timeout(10):
        while True:
            stack.registry.asked.clear()
            answer = await stack.complete("hi", model=model)
            assert answer.status_code == 200, answer.text
            if not stack.registry.asked:
                return str(answer.headers[DIGEST])


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_known_answers_without_a_question(leased: Any, stream: bool) -> None:
    answer = await leased.complete("hi", model="loud", stream=stream)
    assert (answer.status_code, answer.headers[DIGEST]) == (200, leased.registry.versions["loud"][1].digest)
    assert leased.registry.asked == []


async def test_metrics_tell_who_said_what_names_stand_for(leased: Any) -> None:
    before = await _resolved(leased)
    await leased.complete("hi", model="loud")
    await leased.complete("hi", model=leased.registry.versions["loud"][1].digest)  # digests are asked for
    await leased.complete("hi")  # has no adapter
    after = await _resolved(leased)
    assert (after - before) == {"lease": 1, "registry": 1}


async def _resolved(stack: Any) -> Counter[str]:
    text = (await stack.http.get("/metrics")).text
    found = re.findall(r'softprompt_gateway_resolve_seconds_count\{by="(\w+)"\} (\d+)', text)
    return Counter({by: int(count) for by, count in found})


async def test_what_changes_is_taken_first_and_answers_without_a_question(leased: Any) -> None:
    given = leased.registry.leases
    newer = await leased.registry.add("loud")
    await leased.registry.until(lambda fake: fake.leases > given)  # it has told the registry
    answer = await leased.complete("hi", model="loud")
    assert answer.headers[DIGEST] == newer.digest
    assert leased.registry.asked == []


async def test_what_is_not_known_is_asked_for(leased: Any) -> None:
    digest = leased.registry.versions["loud"][1].digest
    for model in ("quiet", "loud@7", "loud@prod", digest):
        leased.registry.asked.clear()
        await leased.complete("hi", model=model)
        assert leased.registry.asked


async def test_tokens_are_counted_without_a_question(leased: Any) -> None:
    answer = await leased.post("/tokenize", model="loud", prompt="hi")
    assert answer.status_code == 200
    assert leased.registry.asked == []


async def test_a_damaged_version_is_asked_for_again(leased: Any) -> None:
    given = leased.registry.leases
    event = leased.registry.log[-1]
    event = type(event)(type=event.type)
    event.adapter.name, event.adapter.version = "loud", 2
    leased.registry.damaged.add("loud")
    await leased.registry.tell(event)
    await leased.registry.until(lambda fake: fake.leases > given)
    answer = await leased.complete("hi", model="loud")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "data_corrupted")


@pytest.mark.parametrize("lease_s", [0.5])
async def test_a_registry_that_ends_the_stream_is_asked_until_it_gives_another(leased: Any) -> None:
    leased.registry.silent = True  # no lease until it is told of this version
    newer = await leased.registry.add("loud")
    port = leased.services["registry"].port
    await leased.services["registry"].stop(0)
    await leased.restart_registry(port)
    async with asyncio.timeout(10):
        while (await leased.complete("hi", model="loud")).headers[DIGEST] != newer.digest:
            pass
    assert "loud" in leased.registry.asked


async def test_a_gateway_that_stops_gives_its_lease_back(running_stack: Any) -> None:
    async with running_stack() as stack:
        await stack.registry.add("loud")
        await stack.until_listed("loud")
        stack.registry.lease_s = 60.0
        await stack.complete("hi", model="loud")
        await stack.registry.until(lambda fake: fake.leases)
        stack.gateway.server.stop()
        await stack.gateway.serving
        assert stack.registry.given_back == 1


async def test_a_gateway_that_uses_no_adapter_asks_for_no_lease(stack: Any) -> None:
    stack.registry.lease_s = 60.0
    await stack.complete("hi")
    assert stack.registry.leases == 0


class _Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class _Registry:
    """Gives leases of 2 s, as many as it is told to; while it answers, its clock runs."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self.cursors: list[str] = []
        self.given = asyncio.Semaphore(0)
        self.ends = 0

    @asynccontextmanager
    async def open_lease(self) -> AsyncIterator[Callable[[str], Awaitable[float]]]:
        async def ask(cursor: str) -> float:
            self.cursors.append(cursor)
            if not cursor:
                return 0.0
            await self.given.acquire()
            if cursor == "broken":
                raise Unavailable("away")
            self._clock.now_s += 0.5
            return 2.0

        yield ask
        self.ends += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(lease_module, "_now_s", clock)
    return clock


@pytest.fixture
async def held(clock: _Clock) -> AsyncIterator[tuple[Catalog, _Registry, Lease]]:
    """A lease that is kept up, and wanted; nothing has been listed."""
    catalog, registry = Catalog(), _Registry(clock)
    lease = Lease(catalog, cast(RegistryClient, registry))
    running = asyncio.create_task(lease.run())
    assert not lease.is_held()  # and it is wanted from now on
    await _turns()
    yield catalog, registry, lease
    await stop(running)


async def _turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_lease_counts_from_when_it_was_asked_for_and_ends_early(held: Any, clock: _Clock) -> None:
    catalog, registry, lease = held
    catalog.take("1")
    await _turns()
    assert not lease.is_held()
    registry.given.release()
    await _turns()
    assert lease.is_held()  # at 1000.5
    clock.now_s = 1001.79
    assert lease.is_held()
    clock.now_s = 1001.81
    assert not lease.is_held()


async def test_a_change_that_was_taken_is_told_at_once(held: Any) -> None:
    catalog, registry, _ = held
    assert registry.cursors == []  # nothing has been listed
    for cursor in "12":
        catalog.take(cursor)
        registry.given.release()
        await _turns()
    assert registry.cursors == ["1", "2"]


async def test_a_lease_that_nobody_uses_is_given_back(held: Any, clock: _Clock) -> None:
    catalog, registry, lease = held
    catalog.take("1")
    registry.given.release()
    await _turns()
    clock.now_s += 301
    catalog.take("2")
    await _turns()
    assert (registry.ends, registry.cursors) == (1, ["1", ""])
    registry.given.release()
    assert not lease.is_held()  # and it is wanted again
    await _turns()
    assert registry.cursors == ["1", "", "2"]
    assert lease.is_held()


async def test_a_stream_that_breaks_leaves_no_lease(held: Any) -> None:
    catalog, registry, lease = held
    catalog.take("1")
    registry.given.release()
    await _turns()
    assert lease.is_held()
    catalog.take("broken")
    registry.given.release()
    await _turns()
    assert not lease.is_held()
