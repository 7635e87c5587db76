"""What keys may take: counted by one gateway alone, and by several together in a real store."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import softprompt_gateway.counters
import softprompt_gateway.rates
from redis.asyncio import Redis
from softprompt_api.access import Scope, key_sha256
from softprompt_api.errors import RateLimited
from softprompt_api.registry.v1.registry_pb2 import KeyLimits
from softprompt_gateway.caller import ANYBODY, Caller
from softprompt_gateway.counters import SharedCounters
from softprompt_gateway.rates import Limiter, Meter


def caller(key_id: str = "key-1", **limits: int) -> Caller:
    return Caller(key_id=key_id, limits=KeyLimits(**limits))


@pytest.fixture(params=["alone", "together"])
async def limiters(request: pytest.FixtureRequest, store: Any) -> AsyncIterator[tuple[Limiter, Limiter]]:
    """Two that count together: one gateway's twice, or those of two gateways over one store."""
    if request.param == "alone":
        limiter = Limiter(None, max_requests=100, lease_s=60)
        yield limiter, limiter
        return
    await store.ready()
    both = Limiter(store.url, max_requests=100, lease_s=60), Limiter(store.url, max_requests=100, lease_s=60)
    yield both
    for limiter in both:
        await limiter.close()


async def take(limiter: Limiter, who: Caller, tokens: int = 0) -> dict[str, str]:
    meter = Meter()
    async with limiter.admitted(who, meter) as headers:
        meter.tokens = tokens
        return headers


async def test_requests_in_a_minute_are_bounded_over_all_gateways(limiters: Any) -> None:
    one, other = limiters
    who = caller(requests_per_minute=3)
    headers = [await take(limiter, who) for limiter in (one, other, one)]
    assert [told["x-ratelimit-remaining-requests"] for told in headers] == ["2", "1", "0"]
    assert {told["x-ratelimit-limit-requests"] for told in headers} == {"3"}
    for limiter in limiters:
        with pytest.raises(RateLimited, match="3 requests in a minute") as refused:
            await take(limiter, who)
        assert 50_000 < int(refused.value.details["retry_after_ms"]) <= 60_000
    await take(one, caller("key-2", requests_per_minute=3))


async def test_tokens_in_a_minute_are_counted_when_they_were_made(limiters: Any) -> None:
    one, other = limiters
    who = caller(tokens_per_minute=100)
    assert (await take(one, who, tokens=60))["x-ratelimit-remaining-tokens"] == "100"
    assert (await take(other, who, tokens=60))["x-ratelimit-remaining-tokens"] == "40"
    for limiter in limiters:
        with pytest.raises(RateLimited, match="100 tokens in a minute"):
            await take(limiter, who)


async def test_tokens_of_a_request_that_failed_are_counted_too(limiters: Any) -> None:
    one, other = limiters
    who = caller(tokens_per_minute=10)

    async def fail() -> None:
        async with one.admitted(who, meter := Meter()):
            meter.tokens = 10
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with pytest.raises(RateLimited):
        await take(other, who)


async def test_what_is_refused_for_its_tokens_costs_no_request(limiters: Any) -> None:
    one, _ = limiters
    who = caller(tokens_per_minute=10, requests_per_minute=5)
    await take(one, who, tokens=10)
    with pytest.raises(RateLimited, match="tokens"):
        await take(one, who)
    left = await take(one, caller(requests_per_minute=5))
    assert left["x-ratelimit-remaining-requests"] == "3"


async def test_requests_at_the_same_time_are_bounded_over_all_gateways(limiters: Any) -> None:
    one, other = limiters
    who = caller(parallel_requests=2)
    async with one.admitted(who, Meter()), other.admitted(who, Meter()):
        for limiter in limiters:
            with pytest.raises(RateLimited, match="2 requests answered at the same time"):
                await take(limiter, who)
        await take(one, caller("key-2", parallel_requests=2))
    for limiter in limiters:
        await take(limiter, who)


async def test_places_are_never_given_twice(limiters: Any) -> None:
    one, other = limiters
    who, running, most = caller(parallel_requests=5), 0, 0

    async def run(limiter: Limiter) -> bool:
        nonlocal running, most
        try:
            async with limiter.admitted(who, Meter()):
                running += 1
                most = max(most, running)
                await asyncio.sleep(0)
                running -= 1
        except RateLimited:
            return False
        return True

    done = await asyncio.gather(*[run(limiter) for _ in range(20) for limiter in (one, other)])
    assert 1 <= most <= 5
    assert any(done)


async def test_a_key_without_limits_is_told_nothing(limiters: Any) -> None:
    one, _ = limiters
    for who in (ANYBODY, caller()):
        assert await take(one, who, tokens=10**6) == {}


async def test_a_place_of_a_gateway_that_died_is_free_after_its_lease(store: Any) -> None:
    await store.ready()
    alive, who = Limiter(store.url, max_requests=100, lease_s=60), caller(parallel_requests=1)
    dead = SharedCounters(store.url, lease_s=0.5)
    await dead._hold(dead._places(who.key_id), "a lease that nobody renews")
    with pytest.raises(RateLimited):
        await take(alive, who)
    await until_taken(alive, who)
    await dead.close()
    await alive.close()


async def test_a_place_that_could_not_be_given_back_is_free_after_its_lease(store: Any) -> None:
    await store.ready()
    limiter, who = Limiter(store.url, max_requests=100, lease_s=1), caller(parallel_requests=1)
    async with limiter.admitted(who, Meter()):
        await store.kill()
    await store.start()
    await store.ready()
    await until_taken(limiter, who)
    await limiter.close()


async def test_a_request_has_its_place_for_longer_than_a_lease(store: Any) -> None:
    await store.ready()
    limiter, who = Limiter(store.url, max_requests=100, lease_s=0.5), caller(parallel_requests=1)
    async with limiter.admitted(who, Meter()), asyncio.timeout(10):
        first_s = last_s = await lease_ends_s(store, who)
        while last_s < first_s + 1:
            last_s = await lease_ends_s(store, who)
            with pytest.raises(RateLimited):
                await take(limiter, who)
    await take(limiter, who)
    await limiter.close()


async def lease_ends_s(store: Any, who: Caller) -> float:
    """When the lease of a caller's request ends, the latest if there are several."""
    async with Redis.from_url(store.url) as client:
        leases = await client.zrange(SharedCounters._places(who.key_id), 0, 0, desc=True, withscores=True)
    return float(leases[0][1])


async def until_taken(limiter: Limiter, who: Caller) -> None:
    """Try until there is a place."""
    async with asyncio.timeout(10):
        while True:
            try:
                await take(limiter, who)
                return
            except RateLimited:
                continue


async def test_while_the_store_is_away_a_gateway_counts_alone(
    store: Any, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(softprompt_gateway.rates, "_AWAY_S", 0.0)
    await store.ready()
    limiter = Limiter(store.url, max_requests=100, lease_s=60)
    who = caller(requests_per_minute=2, tokens_per_minute=100, parallel_requests=2)
    async with limiter.admitted(who, Meter()):
        await store.kill()
    assert (await take(limiter, who))["x-ratelimit-remaining-requests"] == "1"
    await take(limiter, who)
    with pytest.raises(RateLimited):
        await take(limiter, who)
    assert any("counts alone" in line["event"] for line in logged)
    await store.start()
    await store.ready()
    assert (await take(limiter, who))["x-ratelimit-remaining-requests"] == "0", "the store kept its count"
    await limiter.close()


async def test_a_flood_does_not_make_a_gateway_count_alone(
    store: Any, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    # A busy machine may take long to connect; that is not what a flood may cost.
    monkeypatch.setattr(softprompt_gateway.counters, "_TIMEOUT_S", 20.0)
    await store.ready()
    limiter = Limiter(store.url, max_requests=1000, lease_s=60)
    assert limiter._shared is not None
    limiter._shared._pool.timeout = 0.05  # nobody may have to wait for a connection
    who = caller(requests_per_minute=5)
    taken = await asyncio.gather(*[take(limiter, who) for _ in range(500)], return_exceptions=True)
    assert sum(isinstance(each, dict) for each in taken) == 5
    assert {type(each) for each in taken} == {dict, RateLimited}
    assert not any("counts alone" in line["event"] for line in logged)
    await limiter.close()


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    return {"require_keys": True}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def post(stack: Any, key: str, prompt: str = "hi", **body: Any) -> Any:
    body = {"model": stack.base, "prompt": prompt, "max_tokens": 100, **body}
    return await stack.http.post("/v1/completions", json=body, headers=bearer(key))


async def test_a_refusal_says_when_to_try_again(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER, limits=KeyLimits(requests_per_minute=1))
    first, second = await post(stack, key), await post(stack, key)
    assert (first.status_code, second.status_code) == (200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-reset-requests"] in ("59s", "60s")
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(second.headers["retry-after-ms"]) <= 60_000
    assert 0 < int(second.headers["retry-after"]) <= 60
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    async with stack.sdk(api_key=key) as client:
        with pytest.raises(openai.RateLimitError):
            await client.models.list()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_tokens_of_prompts_and_outputs_are_counted(stack: Any, route: str, stream: bool) -> None:
    key = await stack.registry.keys.make(Scope.INFER, limits=KeyLimits(tokens_per_minute=100))
    prompt = {"prompt": "abcd"} if route == "completions" else {"messages": [{"role": "user", "content": "abcd"}]}
    body = {"model": stack.base, "max_tokens": 100, "n": 2, "stream": stream, **prompt}
    for remaining in ("100", "88", "76"):  # 4 of the prompt, 2 × 4 of the choices
        answer = await stack.http.post(f"/v1/{route}", json=body, headers=bearer(key))
        assert answer.headers["x-ratelimit-remaining-tokens"] == remaining


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_responses_are_counted(stack: Any, stream: bool) -> None:
    key = await stack.registry.keys.make(Scope.INFER, limits=KeyLimits(tokens_per_minute=100))
    body = {"model": stack.base, "input": "abcd", "stream": stream}
    for remaining in ("100", "92", "84"):  # 4 of the input, 4 of the output
        answer = await stack.http.post("/v1/responses", json=body, headers=bearer(key))
        assert answer.headers["x-ratelimit-remaining-tokens"] == remaining


async def test_tokens_of_a_stream_that_its_client_left_are_counted(stack: Any) -> None:
    limits = KeyLimits(tokens_per_minute=1000, parallel_requests=1)
    key = await stack.registry.keys.make(Scope.INFER, limits=limits)
    body = {"model": stack.base, "prompt": "stall", "max_tokens": 100, "stream": True}
    async with stack.http.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as answer:
        lines = answer.aiter_lines()
        assert '"s"' in await anext(lines)
        assert (await post(stack, key)).status_code == 429, "its place is taken"
    async with asyncio.timeout(5):
        while (after := await post(stack, key)).status_code == 429:
            pass
    assert after.headers["x-ratelimit-remaining-tokens"] == str(1000 - len("stall") - 1)


async def test_errors_carry_the_headers_too(stack: Any) -> None:
    key = await stack.registry.keys.make(Scope.INFER, limits=KeyLimits(requests_per_minute=5))
    answer = await post(stack, key, temperature=9)
    assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (400, "4")


async def test_a_place_is_taken_for_a_minute_however_long_a_request_may_last(
    store: Any, running_stack: Any
) -> None:
    await store.ready()
    async with running_stack(require_keys=True, limits_redis_url=store.url) as stack:
        key = await stack.registry.keys.make(Scope.INFER, limits=KeyLimits(parallel_requests=1))
        running = asyncio.create_task(post(stack, key, "wait"))
        await stack.inference.until(lambda fake: fake.running == 1)
        assert time.time() < await lease_ends_s(store, caller(f"key-{key_sha256(key)[:12]}")) <= time.time() + 60
        stack.inference.released.set()
        assert (await running).status_code == 200
