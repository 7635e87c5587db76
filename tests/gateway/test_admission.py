"""How many requests are answered at a time, and how a gateway stops: its last ones are answered, others told."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from softprompt_api.errors import Overloaded, Unavailable
from softprompt_gateway import server as server_module
from softprompt_gateway.admission import Admission


def test_so_many_are_let_in_and_health_checks_always() -> None:
    admission = Admission(1)
    with admission.admitted("/v1/models"):
        with pytest.raises(Overloaded), admission.admitted("/v1/models"):
            pass
        with admission.admitted("/health/ready"):
            assert admission.num_running == 2
    with admission.admitted("/v1/models"):
        assert admission.num_running == 1


async def test_it_is_idle_when_the_last_has_gone() -> None:
    admission = Admission(5)
    waiting = asyncio.create_task(admission.wait_until_idle())
    await waiting
    with admission.admitted("/v1/models"):
        waiting = asyncio.create_task(admission.wait_until_idle())
        with admission.admitted("/v1/models"):
            pass
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.01)
    await waiting


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/health/ready", "/version"])
def test_who_comes_to_one_that_stops_is_told_to_come_again(path: str) -> None:
    admission = Admission(5)
    admission.stop()
    with pytest.raises(Unavailable, match="stopping"), admission.admitted(path):
        pass
    for answered in ("/health/live", "/metrics"):
        with admission.admitted(answered):
            pass


@pytest.mark.parametrize("gateway_settings", [{"grace_s": 20}])
async def test_a_gateway_that_stops_ends_what_runs_and_refuses_the_rest(stack: Any) -> None:
    body = {"model": stack.base, "prompt": "wait", "max_tokens": 100}
    running = asyncio.create_task(stack.post("/v1/completions", **body))
    content = json.dumps(body | {"prompt": "hello"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    reader, writer = await stack.connect(head.encode() + content[:5])
    await stack.inference.until(lambda fake: fake.running == 1)
    while stack.gateway.admission.num_running < 2:
        await stack.http.get("/health/live")
    stack.gateway.server.stop()
    refused = [await stack.http.get("/v1/models"), await stack.http.get("/health/ready")]
    async with httpx.AsyncClient(base_url=stack.url) as http:
        refused.append(await http.post("/v1/completions", json=body))
        assert (await http.get("/health/live")).status_code == 200
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["connection"] == "close"
        assert answer.headers["retry-after"]
    writer.write(content[5:])
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    stack.inference.released.set()
    assert (await running).json()["choices"][0]["text"] == "wwait"
    async with asyncio.timeout(10):
        await stack.gateway.serving


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("gateway_settings", [{"grace_s": 0}])
async def test_whom_the_grace_is_too_short_for_is_told_to_come_again(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_FLUSH_S", 3600.0)  # nobody waits for it who has been told
    said = {
        "/v1/completions": {"prompt": "stall"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "stall"}]},
        "/v1/responses": {"input": "stall"},
    }
    streams, wholes = [], []
    for path, body in said.items():
        reader, _ = await stack.connect(_request(path, {"model": stack.base, "stream": True} | body))
        await reader.readuntil(b"data: ")
        streams.append(reader)
        wholes.append((await stack.connect(_request(path, {"model": stack.base} | body)))[0])
    late = _request("/v1/completions", {"model": stack.base, "prompt": "hello"})
    wholes.append((await stack.connect(late[:-5]))[0])
    await stack.inference.until(lambda fake: fake.running == 6)
    while stack.gateway.admission.num_running < 7:
        await stack.http.get("/health/live")
    async with asyncio.timeout(10):
        stack.gateway.server.stop()
        for reader in streams:
            answer = await reader.read()
            assert b'"code":"unavailable"' in answer
            assert b"this gateway is stopping; try again" in answer
            assert b"[DONE]" not in answer
            assert answer.endswith(b"\r\n0\r\n\r\n")
        for reader in wholes:
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            error = json.loads(answer)["error"]
            assert (error["code"], error["message"]) == ("unavailable", "this gateway is stopping; try again")
        await stack.gateway.serving
    await stack.inference.until(lambda fake: fake.cancelled == 6)


@pytest.mark.parametrize("gateway_settings", [{"grace_s": 3600}])
async def test_a_gateway_that_is_stopped_twice_ends_at_once(stack: Any) -> None:
    await stack.connect(_request("/v1/completions", {"model": stack.base, "prompt": "stall"}))
    await stack.inference.until(lambda fake: fake.running == 1)
    async with asyncio.timeout(10):
        stack.gateway.server.stop()
        stack.gateway.server.stop()
        await stack.gateway.serving
