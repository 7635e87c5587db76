"""Several inference services behind one gateway: who gets what, and what it costs when one of them goes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.errors import Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from softprompt_api.rpc.channel import open_channel
from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.discovery import Discovery, Places
from softprompt_gateway.placement import Place, order
from softprompt_gateway.replica import Replica
from softprompt_gateway.replicas import Replicas

BASE = "acme/tiny-1"
OTHER = "acme/tiny-2"
RunningStack = Callable[..., AbstractAsyncContextManager[Any]]


@pytest.fixture
def bases() -> Sequence[str]:
    """What the replicas serve; tests override this by parametrising it."""
    return (BASE, BASE)


@pytest.fixture
async def stack(running_stack: RunningStack, bases: Sequence[str]) -> AsyncIterator[Any]:
    """A gateway over two replicas."""
    async with running_stack(bases=bases) as running:
        yield running


TWO_BASES = pytest.mark.parametrize("bases", [(BASE, OTHER)])


async def until(stack: Any, condition: Callable[[], bool]) -> None:
    """Ask for something else until it holds."""
    async with asyncio.timeout(10):
        while not condition():
            await stack.http.get("/health/live")


async def add_adapters(stack: Any, *names: str, base: str = BASE) -> dict[str, Any]:
    stack.registry.base_model_id = base
    return {name: await stack.registry.add(name) for name in names}


def numbers_of(stack: Any, digest: str) -> set[int]:
    """The replicas that were asked for an adapter."""
    every = enumerate(stack.replicas)
    return {number for number, replica in every if digest in {asked.adapter for asked in replica.requests}}


async def start_streams(stack: Any, count: int, model: str = BASE) -> list[asyncio.StreamReader]:
    """Streams that have said something and wait."""
    readers = []
    for _ in range(count):
        body = json.dumps({"model": model, "prompt": "wait", "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        reader, _ = await stack.connect(head + body)
        await reader.readuntil(b"data: ")
        readers.append(reader)
    return readers


async def test_an_adapter_has_one_replica_and_all_have_some(stack: Any) -> None:
    versions = await add_adapters(stack, *(f"a{number}" for number in range(24)))
    for _ in range(2):
        for name in versions:
            assert (await stack.complete("hi", model=name)).json()["choices"][0]["text"] == "HI"
    names = [stack.replica_name(0), stack.replica_name(1)]
    for version in versions.values():
        first = order(version.digest.encode(), names)[0]
        assert numbers_of(stack, version.digest) == {names.index(first)}
    assert all(replica.requests for replica in stack.replicas)


async def test_a_composition_goes_with_its_first_adapter(stack: Any) -> None:
    versions = await add_adapters(stack, "a", "b", "c")
    for model in ("a", "a+b", "a+c", "a+c+b"):
        assert (await stack.complete("hi", model=model)).status_code == 200
    used = [replica for replica in stack.replicas if replica.requests]
    assert len(used) == 1
    assert all(asked.adapter.startswith(versions["a"].digest) for asked in used[0].requests)


async def test_a_hot_adapter_spreads(stack: Any) -> None:
    await add_adapters(stack, "hot")
    await start_streams(stack, 8, "hot")
    assert sorted(replica.running for replica in stack.replicas) == [3, 5]


async def test_what_runs_with_many_choices_counts_as_many(stack: Any) -> None:
    hot = (await add_adapters(stack, "hot"))["hot"]
    waiting = asyncio.create_task(stack.complete("queue", model="hot", n=8))
    names = [stack.replica_name(0), stack.replica_name(1)]
    first = names.index(order(hot.digest.encode(), names)[0])
    await stack.replicas[first].until(lambda fake: fake.running == 1)
    for _ in range(3):
        assert (await stack.complete("hi", model="hot")).status_code == 200
    assert len(stack.replicas[1 - first].requests) == 3
    stack.replicas[first].released.set()
    assert len((await waiting).json()["choices"]) == 8
    assert (await stack.complete("hi", model="hot")).status_code == 200
    assert len(stack.replicas[first].requests) == 2


async def test_what_nobody_waits_for_any_more_counts_no_more(stack: Any) -> None:
    hot = (await add_adapters(stack, "hot"))["hot"]
    await start_streams(stack, 8, "hot")
    for connection in stack.connections:
        connection.transport.abort()
    for replica in stack.replicas:
        await replica.until(lambda fake: not fake.running)
    before = [len(replica.requests) for replica in stack.replicas]
    assert (await stack.complete("hi", model="hot")).status_code == 200
    names = [stack.replica_name(0), stack.replica_name(1)]
    before[names.index(order(hot.digest.encode(), names)[0])] += 1
    assert [len(replica.requests) for replica in stack.replicas] == before


async def test_each_replica_has_one_stream_for_all_requests(stack: Any) -> None:
    texts = [f"{number} text" for number in range(30)]
    answers = await asyncio.gather(*[stack.complete(text) for text in texts])
    assert [answer.json()["choices"][0]["text"] for answer in answers] == texts
    assert [replica.sessions for replica in stack.replicas] == [1, 1]


async def test_a_replica_that_is_gone_costs_no_new_request(stack: Any) -> None:
    await add_adapters(stack, *(f"a{number}" for number in range(8)))
    for number in range(8):
        assert (await stack.complete("hi", model=f"a{number}")).status_code == 200
    await stack.services["inference-1"].stop(0)
    for number in range(8):
        answer = await stack.complete("hi", model=f"a{number}")
        assert answer.json()["choices"][0]["text"] == "HI"
    assert (await stack.http.get("/health/ready")).json()["status"] == "ok"


@pytest.mark.parametrize("prompt", ["queue", "think"])
async def test_what_has_said_nothing_goes_on_elsewhere(stack: Any, prompt: str) -> None:
    await add_adapters(stack, "a")
    asking = asyncio.create_task(stack.complete(prompt, model="a"))
    await until(stack, lambda: any(replica.running for replica in stack.replicas))
    other = await leave(stack)
    answer = (await asking).json()
    assert answer["choices"][0]["text"] == prompt.upper()
    assert answer["usage"]["completion_tokens"] == len(prompt)
    assert len(other.requests) == 1


async def test_a_stream_that_has_said_nothing_goes_on_elsewhere(stack: Any) -> None:
    body = {"model": stack.base, "messages": [{"role": "user", "content": "think"}]}
    asking = asyncio.create_task(stack.events("/v1/chat/completions", **body))
    await until(stack, lambda: any(replica.running for replica in stack.replicas))
    await leave(stack)
    *events, done = await asking
    assert done == "[DONE]"
    assert [event["choices"][0]["delta"].get("role") for event in events].count("assistant") == 1
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == "think"


async def test_all_prompts_of_a_request_go_on_elsewhere_together(stack: Any) -> None:
    asking = asyncio.create_task(stack.complete(["queue", "queue"]))
    await until(stack, lambda: any(len(replica.requests) == 2 for replica in stack.replicas))
    other = await leave(stack)
    assert [choice["text"] for choice in (await asking).json()["choices"]] == ["queue", "queue"]
    assert len(other.requests) == 2


async def leave(stack: Any) -> Any:
    """Stop the one replica at which something runs; the other one, which lets everything go on."""
    [number] = [number for number, replica in enumerate(stack.replicas) if replica.running]
    other = stack.replicas[1 - number]
    other.released.set()
    await stack.services[f"inference-{number}" if number else "inference"].stop(0)
    return other


async def test_what_cannot_be_served_on_one_replica_is_served_on_another(stack: Any) -> None:
    # Draining, or without the adapter while the registry is away.
    answer = await stack.complete("refuse UNAVAILABLE")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "refused as asked")
    assert [len(replica.requests) for replica in stack.replicas] == [1, 1]


@pytest.mark.parametrize("reason", ["OVERLOADED", "INVALID_ARGUMENT", "DATA_CORRUPTED"])
async def test_what_is_refused_for_another_reason_is_refused_once(stack: Any, reason: str) -> None:
    assert (await stack.complete(f"refuse {reason}")).status_code >= 400
    assert sum(len(replica.requests) for replica in stack.replicas) == 1


async def test_a_stream_that_has_begun_ends_with_an_error(stack: Any) -> None:
    await add_adapters(stack, "a")
    [reader] = await start_streams(stack, 1, "a")
    [number] = [number for number, replica in enumerate(stack.replicas) if replica.running]
    await stack.services[f"inference-{number}" if number else "inference"].stop(0)
    rest = await reader.readuntil(b"0\r\n\r\n")
    assert b'"code":"unavailable"' in rest
    assert b"[DONE]" not in rest
    assert stack.replicas[1 - number].requests == []


async def test_one_that_does_not_serve_gets_nothing_new_and_comes_back_by_itself(
    stack: Any, logged: list[Any]
) -> None:
    versions = await add_adapters(stack, *(f"a{number}" for number in range(24)))
    name = stack.replica_name(1)

    def has_said(words: str) -> bool:
        return any(
            line["event"] == words and line["replica"] == name for line in list(logged) if "replica" in line
        )

    assert await stack.listed()
    await stack.services["inference-1"].set_serving(False)
    await until(stack, lambda: has_said("inference replica serves no more"))
    for adapter in versions:
        assert (await stack.complete("hi", model=adapter)).status_code == 200
    assert stack.replicas[1].requests == []
    await stack.services["inference-1"].set_serving(True)
    await until(stack, lambda: has_said("inference replica serves"))
    for adapter in versions:
        assert (await stack.complete("hi", model=adapter)).status_code == 200
    assert stack.replicas[1].requests != []


async def test_without_any_replica_requests_say_so(stack: Any) -> None:
    assert await stack.listed()
    for service in ("inference", "inference-1"):
        await stack.services[service].stop(0)
    answer = await stack.complete("hi")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert "127.0.0.1" not in answer.text
    assert (await stack.http.get("/health/ready")).status_code == 503


@TWO_BASES
async def test_every_base_model_is_listed_and_an_adapter_is_a_model_of_its_own(stack: Any) -> None:
    await add_adapters(stack, "one")
    await add_adapters(stack, "two", base=OTHER)
    async with asyncio.timeout(5):
        while len(await stack.listed()) < 4:
            pass
    cards = (await stack.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        (BASE, None),
        (OTHER, None),
        ("one", BASE),
        ("two", OTHER),
    ]
    assert (await stack.http.get(f"/v1/models/{OTHER}")).json()["root"] == OTHER
    assert (await stack.http.get("/v1/models/two")).json()["parent"] == OTHER


@TWO_BASES
async def test_a_request_goes_to_a_replica_of_its_base_model(stack: Any) -> None:
    await add_adapters(stack, "one")
    await add_adapters(stack, "two", base=OTHER)
    for model, number in ((BASE, 0), (OTHER, 1), ("one", 0), ("two", 1), (f"{OTHER}:two", 1), ("two@1", 1)):
        before = [len(replica.requests) for replica in stack.replicas]
        assert (await stack.complete("hi", model=model)).status_code == 200
        before[number] += 1
        assert [len(replica.requests) for replica in stack.replicas] == before
    assert (await stack.complete("hi", model=OTHER, adapters=["two"])).status_code == 200
    assert (await stack.post("/tokenize", model="two", prompt="hi")).json()["tokens"] == list(b"hi")


@TWO_BASES
async def test_adapters_of_different_base_models_do_not_go_together(stack: Any) -> None:
    await add_adapters(stack, "one")
    await add_adapters(stack, "two", base=OTHER)
    for model, adapters, param in (
        ("one+two", [], "model"),
        (f"{BASE}:two", [], "model"),
        (BASE, ["two"], "adapters"),
    ):
        answer = await stack.complete("hi", model=model, **({"adapters": adapters} if adapters else {}))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert f"'two' is for the base model '{OTHER}'" in answer.json()["error"]["message"]


@TWO_BASES
async def test_an_adapter_whose_base_model_nobody_serves_is_not_computed_with_another(stack: Any) -> None:
    await add_adapters(stack, "lost", base="acme/gone")
    answer = await stack.complete("hi", model="lost")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_model_unknown")
    assert "'acme/gone', which no replica serves" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "2"
    assert await stack.listed() == [BASE, OTHER]


@TWO_BASES
async def test_where_the_base_model_may_be_left_out_one_of_several_must_be_named(stack: Any) -> None:
    answer = await stack.post("/detokenize", tokens=[104, 105])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    answer = await stack.post("/detokenize", tokens=[104, 105], model=OTHER)
    assert answer.json() == {"prompt": "hi"}


@TWO_BASES
async def test_an_unknown_model_is_told_with_a_near_one_of_any_base(stack: Any) -> None:
    answer = await stack.complete("hi", model="acme/tiny-3")
    assert answer.status_code == 404
    assert "did you mean 'acme/tiny-" in answer.json()["error"]["message"]


@TWO_BASES
async def test_ready_needs_a_replica_of_each_base_model(stack: Any) -> None:
    assert (await stack.http.get("/health/ready")).status_code == 200
    assert await stack.listed() == [BASE, OTHER]
    await stack.services["inference-1"].stop(0)
    assert (await stack.http.get("/health/ready")).json()["inference"] == "not serving"
    # The other one serves on, and what is away is known.
    assert (await stack.complete("hi")).status_code == 200
    assert (await stack.complete("hi", model=OTHER)).status_code == 503


@TWO_BASES
async def test_adapters_are_measured_where_they_are_served(stack: Any) -> None:
    await add_adapters(stack, "one")
    await add_adapters(stack, "two", base=OTHER)
    assert (await stack.http.post("/v1/adapters/two/probe")).status_code == 200
    assert (await stack.http.post("/v1/adapters/one/probe")).status_code == 200
    assert (await stack.http.get("/v1/adapters/two/nearest-tokens")).status_code == 200
    assert [replica.probed for replica in stack.replicas] == [["one@1"], ["two@1"]]


async def test_metrics_and_resident_adapters_name_the_replica(stack: Any) -> None:
    names = {stack.replica_name(0), stack.replica_name(1)}
    stack.replicas[1].resident = ("loud@7",)
    resident = (await stack.http.get("/v1/resident_adapters")).json()
    assert resident["total_size"] == 4
    assert {one["replica"] for one in resident["data"]} == names
    assert {one["replica"] for one in resident["data"] if one["model"] == "loud@7"} == {stack.replica_name(1)}
    text = (await stack.http.get("/metrics")).text
    for name in names:
        assert f'softprompt_engine_up{{replica="{name}"}} 1.0' in text
        assert f'softprompt_inference_adapter_hits_total{{replica="{name}",tier="host"}} 5.0' in text
    await stack.services["inference-1"].stop(0)
    text = (await stack.http.get("/metrics")).text
    assert f'softprompt_engine_up{{replica="{stack.replica_name(1)}"}} 0.0' in text
    assert f'softprompt_engine_num_pages{{replica="{stack.replica_name(0)}"}} 64.0' in text


async def test_replicas_come_and_go_with_the_addresses_of_their_name(stack: Any) -> None:
    first, second = stack.replica_name(0), stack.replica_name(1)
    addresses = [first]

    async def look_up(_host: str, _port: int) -> list[str]:
        return list(addresses)

    replicas = Replicas(Discovery(Places.parse("dns:///inference:1"), look_up), open_channel, look_up_s=0.01)

    def serving() -> list[str]:
        return sorted(replica.name for replica in replicas.every if replica.is_up)

    try:
        assert (await replicas.bases()).ids == [BASE]
        assert serving() == [first]
        addresses.append(second)
        await until(stack, lambda: serving() == sorted([first, second]))
        addresses.remove(first)
        await until(stack, lambda: serving() == [second])
        assert [replica.name for replica in replicas.every] == [second]
    finally:
        await replicas.close()


async def test_a_request_is_not_for_what_is_served_in_the_place_of_its_base_model(stack: Any) -> None:
    addresses = [stack.replica_name(0)]

    async def look_up(_host: str, _port: int) -> list[str]:
        return list(addresses)

    replicas = Replicas(Discovery(Places.parse("dns:///inference:1"), look_up), open_channel, look_up_s=0.01)
    try:
        served = (await replicas.bases()).only()
        assert replicas.choose(served, bytes).name == stack.replica_name(0)
        stack.replicas[1].vocab_size = 300
        addresses[:] = [stack.replica_name(1)]
        await until(stack, lambda: [replica.name for replica in replicas.every if replica.is_up] == addresses)
        assert replicas.known_bases.only().base_model.vocab_size == 300
        with pytest.raises(Unavailable):
            replicas.choose(served, bytes)
    finally:
        await replicas.close()


async def test_what_is_up_goes_before_what_is_down_under_the_same_name(stack: Any) -> None:
    stack.replicas[1].vocab_size = 300
    names = [stack.replica_name(0), stack.replica_name(1)]
    replicas = Replicas(Discovery(Places.parse(",".join(names))), open_channel)
    try:
        assert (await replicas.bases()).only().base_model.vocab_size == 256
        await stack.services["inference"].stop(0)
        await until(stack, lambda: not replicas.every[0].is_up)
        served = replicas.known_bases.only()
        assert served.base_model.vocab_size == 300
        assert replicas.choose(served, bytes).name == names[1]
    finally:
        await replicas.close()


async def test_a_replica_that_goes_answers_what_it_was_asked(stack: Any) -> None:
    addresses = [stack.replica_name(0)]

    async def look_up(_host: str, _port: int) -> list[str]:
        return list(addresses)

    replicas = Replicas(Discovery(Places.parse("dns:///inference:1"), look_up), open_channel, look_up_s=0.01)
    client = InferenceClient(replicas, timeout_s=60, generate_timeout_s=60)
    place = Place(served=(await client.bases()).only())
    asking = asyncio.create_task(client.tokenize(place, pb.TokenizeRequest(text="queue")))
    await stack.inference.until(lambda fake: fake.tokenizing == 1)
    [gone] = replicas.every
    addresses[:] = [stack.replica_name(1)]
    with contextlib.suppress(grpc.aio.UsageError):  # its channel takes no more
        while True:
            await gone.stub.GetLoad(pb.GetLoadRequest())
    stack.inference.released.set()
    assert (await asking).ids == list(b"queue")
    await client.close()


class _Stuck(health_pb2_grpc.HealthServicer):
    """Says once that it serves, and nothing any more."""

    def __init__(self) -> None:
        self._has_said = False

    async def Watch(self, _request: Any, _context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:  # noqa: N802
        if not self._has_said:
            self._has_said = True
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        await asyncio.Event().wait()


async def test_one_that_is_stuck_serves_no_more(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_gateway.replica._MAX_WATCH_S", 1.0)
    monkeypatch.setattr("softprompt_gateway.replica._FIRST_ANSWER_S", 0.1)
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(stack.inference, server)
    health_pb2_grpc.add_HealthServicer_to_server(_Stuck(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen: list[bool] = []
    replica = Replica("stuck", open_channel(f"127.0.0.1:{port}"), lambda: seen.append(replica.is_up))
    await until(stack, lambda: seen[:2] == [True, False])
    await replica.close()
    await server.stop(None)
