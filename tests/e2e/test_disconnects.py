"""Clients that leave in every way (P5): their pages are free again, and nothing is computed to its end."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.rpc.channel import open_channel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TOKENS = 1900
AT_ONCE = 40
DEADLINE_S = 1.5
NAME = "who-leaves"  # the id of every request
BODY = {"model": "tiny", "prompt": "On and on it goes", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
REQUEST = pb.GenerateRequest(
    request_id=NAME,
    text="On and on it goes",
    sampling=pb.SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0),
)


class Clients:
    """Each way asks for much, and leaves when it is told to."""

    def __init__(self, system: Any, headers: dict[str, str]) -> None:
        self._port = system.port
        self._headers = headers
        self.http = httpx.AsyncClient(base_url=system.url, headers=headers, timeout=120)
        self.channel = open_channel(system.inference)
        self.stub = InferenceServiceStub(self.channel)
        self.leave = asyncio.Event()
        self.ways: list[Callable[[], Awaitable[None]]] = [
            self.stream,
            self.whole,
            self.slow_reader,
            self.cancelled_call,
            self.late_call,
        ]

    async def close(self) -> None:
        await self.http.aclose()
        await self.channel.close()

    async def stream(self) -> None:
        async with self.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            await anext(response.aiter_lines())
            await self.leave.wait()

    async def whole(self) -> None:
        writer = await self._send(BODY)
        await self.leave.wait()
        writer.close()

    async def slow_reader(self) -> None:
        # Some kilobytes for each token, of which it takes none.
        writer = await self._send(BODY | {"stream": True, "logprobs": 20}, receives_bytes=4096)
        await self.leave.wait()
        writer.transport.abort()

    async def _send(self, body: dict[str, Any], *, receives_bytes: int = 0) -> asyncio.StreamWriter:
        connection = socket.socket()
        if receives_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        reader, writer = await asyncio.open_connection(sock=connection)
        if receives_bytes:
            reader._transport.pause_reading()
        content = json.dumps(body)
        headers = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{headers}"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n{content}".encode())
        return writer

    async def cancelled_call(self) -> None:
        call = self.stub.Generate(REQUEST)
        await call.read()
        await self.leave.wait()
        call.cancel()

    async def late_call(self) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for _ in self.stub.Generate(REQUEST, timeout=DEADLINE_S):
                pass


def endings(system: Any) -> Counter[str]:
    """How many generations ended well, "generated", and how many did not, "not generated"."""
    log = (system.data_dir / "logs" / "inference.log").read_text("utf-8")
    lines = [json.loads(line) for line in log.splitlines() if NAME in line]
    return Counter(line["event"] for line in lines if line["request_id"] == NAME)


@pytest.mark.parametrize("num_requests", [AT_ONCE, pytest.param(200, marks=pytest.mark.chaos)])
async def test_whoever_leaves_frees_its_pages_and_is_computed_no_further(
    shared_system: Any, wait_until: Callable[..., None], num_requests: int
) -> None:
    headers = shared_system.make_key() | {"x-request-id": NAME}
    num_left = 0
    for _ in range(num_requests // AT_ONCE):
        clients = Clients(shared_system, headers)
        staying = [way for way in clients.ways * (AT_ONCE // len(clients.ways)) if way != clients.late_call]

        async def until_all_run(clients: Clients, num: int) -> None:
            while (await clients.stub.GetLoad(pb.GetLoadRequest())).running < num:
                pass
            clients.leave.set()

        async with asyncio.TaskGroup() as group:
            for way in clients.ways * (AT_ONCE // len(clients.ways)):
                group.create_task(way())
            group.create_task(until_all_run(clients, len(staying)))
        await clients.close()
        await asyncio.to_thread(shared_system.wait_until_idle)
        num_left += len(staying)
    await asyncio.to_thread(
        wait_until, lambda: endings(shared_system)["not generated"] >= num_left, "an end of every request"
    )
    assert not endings(shared_system)["generated"], "somebody was served to the end"
