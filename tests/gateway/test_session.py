"""All requests of a gateway on one stream to the inference service, each with its own fate."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.rpc.channel import MAX_MESSAGE_BYTES, SERVER_OPTIONS
from softprompt_gateway import session as session_module
from softprompt_gateway.clients import _MAX_REQUEST_BYTES, open_clients
from softprompt_gateway.placement import Place
from softprompt_gateway.session import Calls, Delta
from softprompt_gateway.settings import Settings


async def test_requests_share_a_stream(stack: Any) -> None:
    texts = [f"text {number}" for number in range(20)]
    answers = await asyncio.gather(*[stack.complete(text) for text in texts])
    assert [answer.json()["choices"][0]["text"] for answer in answers] == texts
    assert stack.inference.sessions == 1


async def test_an_old_stream_takes_no_further_requests_and_lets_its_own_end(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_MAX_AGE_S", 0.0)
    waiting = asyncio.create_task(stack.complete("wait"))
    await stack.inference.until(lambda fake: fake.running == 1)
    assert (await stack.complete("hello")).status_code == 200
    assert (await stack.complete("hello")).status_code == 200
    assert stack.inference.sessions == 3
    stack.inference.released.set()
    assert (await waiting).json()["choices"][0]["text"] == "wwait"
    await stack.inference.until(lambda fake: fake.open_sessions == 1)


async def test_who_leaves_an_old_stream_is_cancelled_and_who_is_slow_on_it_goes_on(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_MAX_WAITING", 4)
    monkeypatch.setattr(session_module, "_MAX_AGE_S", 0.0)
    body = {"model": stack.base, "prompt": "flood", "stream": True}
    reader, writer = await stack.connect(_request(body))
    await reader.readuntil(b"data: ")
    assert (await stack.complete("hello")).status_code == 200
    assert stack.inference.sessions == 2
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    await stack.inference.until(lambda fake: fake.pauses >= 1)
    writer.transport.resume_reading()
    await reader.read(2**20)
    writer.transport.pause_reading()
    await stack.inference.until(lambda fake: fake.pauses >= 2)
    writer.transport.abort()
    await stack.inference.until(lambda fake: fake.cancelled == 1 and fake.open_sessions == 1)


async def test_a_broken_stream_fails_its_requests_and_the_next_one_opens_another(stack: Any) -> None:
    reader, _ = await stack.connect(_request({"model": stack.base, "prompt": "stall", "stream": True}))
    await reader.readuntil(b"data: ")  # gRPC tries a stream again that has not been answered
    await stack.restart_inference()
    assert b'"code":"unavailable"' in await reader.readuntil(b"0\r\n\r\n")
    async with asyncio.timeout(5):
        while (await stack.complete("hello")).status_code != 200:  # until gRPC has connected again
            pass
    assert stack.inference.open_sessions == 1


async def test_an_unread_stream_pauses_its_call_and_no_other(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MAX_WAITING", 4)
    body = {"model": stack.base, "prompt": "flood", "stream": True}
    reader, writer = await stack.connect(_request(body))
    await reader.readuntil(b"data: ")
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    await stack.inference.until(lambda fake: fake.pauses >= 1)
    assert (await stack.complete("hello")).json()["choices"][0]["text"] == "hello"
    writer.transport.abort()
    await stack.inference.until(lambda fake: fake.cancelled == 1)


@pytest.mark.parametrize("gateway_settings", [{"request_timeout_s": 0.2}])
async def test_a_deadline_ends_all_calls_of_a_request(stack: Any) -> None:
    answer = await stack.complete(["stall", "stall"])
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await stack.inference.until(lambda fake: fake.cancelled == 2)


async def test_what_would_end_the_stream_is_refused_and_others_go_on(stack: Any) -> None:
    await stack.registry.add("a")
    reader, _ = await stack.connect(_request({"model": stack.base, "prompt": "wait", "stream": True}))
    await reader.readuntil(b"data: ")
    parts = [{"type": "text", "text": "x"}, *[{"type": "soft_prompt", "name": "a"}] * 100_000]
    assert (await stack.complete(parts)).status_code == 400
    stack.inference.released.set()
    assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")


async def test_a_request_that_is_too_large_for_a_message_is_not_sent(stack: Any) -> None:
    clients = open_clients(stack.settings)
    place = Place(served=(await clients.inference.bases()).only())
    other = clients.inference.generate(place, [_sized("wait", 1000)])
    await other.wait()
    for prompt in (pb.GenerateRequest(text="x" * MAX_MESSAGE_BYTES), _sized("hello", _MAX_REQUEST_BYTES + 1)):
        with pytest.raises(InvalidArgument, match=f"at most {_MAX_REQUEST_BYTES} may be sent"):
            clients.inference.generate(place, [prompt])
    with pytest.raises(InvalidArgument, match=f"at most {_MAX_REQUEST_BYTES} may be sent"):
        await clients.inference.tokenize(place, pb.TokenizeRequest(text="x" * MAX_MESSAGE_BYTES))
    largest = clients.inference.generate(place, [_sized("hello", _MAX_REQUEST_BYTES)])
    stack.inference.released.set()
    for calls in (other, largest):
        while not calls.is_over:
            await calls.wait()
            calls.take()
    await clients.close()


def _sized(text: str, size_bytes: int) -> pb.GenerateRequest:
    """A request whose message has this size, or a few bytes less where it is small."""
    request = pb.GenerateRequest(text=text, sampling=pb.SamplingParams(n=1))
    request.request_id = "x" * (size_bytes - request.ByteSize() - 5)
    return request


def test_a_connection_that_is_old_lasts_until_the_longest_generation_has_ended() -> None:
    longest_s = 86_400
    Settings(request_timeout_s=longest_s)
    with pytest.raises(ValueError, match="request_timeout_s"):
        Settings(request_timeout_s=longest_s + 1)
    grace_ms = dict(SERVER_OPTIONS)["grpc.max_connection_age_grace_ms"]
    assert grace_ms >= 1000 * (longest_s + session_module._MAX_AGE_S)


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def test_who_takes_all_that_comes_is_never_held_back_however_much_comes_at_once() -> None:
    sent: list[pb.GenerateManyRequest] = []

    class FakeSession:
        send = sent.append

        def start(self, calls: Calls, requests: Sequence[pb.GenerateRequest]) -> None:
            for number in range(len(requests)):
                calls.add(number, number)

        def forget(self, numbers: object) -> None: ...

    calls = Calls([pb.GenerateRequest()] * 100, FakeSession, timeout_s=60)

    def step() -> None:
        for number in range(100):
            calls.put(number, Delta("x"))
        calls.tell()

    for _ in range(3):
        step()
        assert len(calls.take()) == 100
    assert not sent
    for _ in range(64):
        step()
    assert [request.signal for request in sent] == [pb.CALL_SIGNAL_PAUSE] * 100
    calls.cancel()
