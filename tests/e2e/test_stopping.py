"""A stop under load (P6): what was accepted is finished, others are told, and nothing is left behind."""

import asyncio
import json
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

NUM_STREAMS = 8
ASKED = {"model": "first", "prompt": "To the end", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


async def stream(http: httpx.AsyncClient, accepted: asyncio.Barrier) -> list[str]:
    """The lines of a stream that began before the stop."""
    async with http.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as response:
        lines = response.aiter_lines()
        first = await anext(lines)
        await accepted.wait()
        return [first, *[line async for line in lines]]


async def statuses_until_refused(system: Any, headers: dict[str, str]) -> list[int]:
    """What requests on new connections are answered, up to the first that is not served."""
    statuses: list[int] = []
    while not statuses or statuses[-1] == 200:
        async with httpx.AsyncClient(base_url=system.url, headers=headers, timeout=60) as http:
            answer = await http.post("/v1/completions", json=ASKED | {"max_tokens": 1})
            statuses.append(answer.status_code)
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["connection"] == "close"
    assert "retry-after" in answer.headers
    return statuses


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.chaos)])
async def test_accepted_requests_are_finished_and_new_ones_are_told(
    find_shared_system: Callable[[], Any], wait_until: Any, times: int
) -> None:
    for _ in range(times):
        await stop_under_load(await asyncio.to_thread(find_shared_system), wait_until)


async def stop_under_load(system: Any, wait_until: Any) -> None:
    """Stop a system that serves, and check what everybody is answered."""
    headers = system.make_key()
    accepted = asyncio.Barrier(NUM_STREAMS + 1)
    # Of this one only half has come when the system is told to stop.
    content = json.dumps(ASKED).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", system.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: {headers['authorization']}\r\n"
    async with httpx.AsyncClient(base_url=system.url, headers=headers, timeout=60) as http:
        streams = [asyncio.create_task(stream(http, accepted)) for _ in range(NUM_STREAMS)]
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[:20])
        await accepted.wait()
        assert (await http.get("/health/ready")).status_code == 200
        system.process.send_signal(signal.SIGTERM)

        statuses = await statuses_until_refused(system, headers)
        assert set(statuses) <= {200, 503}
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/health/ready")).status_code == 503
        writer.write(content[20:])
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 "), answer[:500]
        for lines in await asyncio.gather(*streams):
            assert lines[-2:] == ["data: [DONE]", ""]
    writer.close()
    assert await asyncio.to_thread(system.process.wait, 60) == 0, system.text()
    await asyncio.to_thread(wait_until, lambda: not system.pids(), "no process to be left")
