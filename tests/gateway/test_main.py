"""The process: `python -m softprompt_gateway`."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

RUN = (sys.executable, "-m", "softprompt_gateway")


@pytest.fixture
async def process(stack: Any) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A gateway process beside the stack's own, over the same services; and its URL."""
    environment = os.environ | {
        "SOFTPROMPT_GATEWAY_PORT": "0",
        "SOFTPROMPT_GATEWAY_GRACE_S": "5",
        "SOFTPROMPT_REGISTRY_ADDRESS": stack.settings.registry_address,
        "SOFTPROMPT_INFERENCE_ADDRESS": stack.settings.inference_address,
        "SOFTPROMPT_LOG_FORMAT": "json",
    }
    process = await asyncio.create_subprocess_exec(*RUN, stderr=asyncio.subprocess.PIPE, env=environment)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            ready = json.loads(await process.stderr.readline())
        assert ready["event"] == "gateway ready"
        yield process, f"http://{ready['host']}:{ready['port']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_it_serves_and_ends_with_status_0_at_sigterm(process: Any) -> None:
    running, url = process
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/health/ready")).status_code == 200
    running.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        assert await running.wait() == 0


async def test_a_request_that_runs_at_sigterm_ends_in_order(stack: Any, process: Any) -> None:
    running, url = process
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        body = {"model": stack.base, "prompt": "wait", "stream": True, "max_tokens": 100}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            running.send_signal(signal.SIGTERM)
            await _until_told(url)
            stack.inference.released.set()
            rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]
    async with asyncio.timeout(10):
        assert await running.wait() == 0


async def _until_told(url: str) -> None:
    """Return once new requests are told that the gateway stops."""
    async with asyncio.timeout(5):
        answer = None
        while answer is None or answer.status_code == 200:
            async with httpx.AsyncClient() as http:
                answer = await http.get(f"{url}/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SOFTPROMPT_GATEWAY_PORT": "x"}, "softprompt gateway: port: "),
        ({"SOFTPROMPT_GATEWAY_NONSENSE": "1"}, "unknown setting SOFTPROMPT_GATEWAY_NONSENSE"),
        # What others call theirs is not read.
        ({"SOFTPROMPT_GATEWAY_HOST": "203.0.113.1", "LOG_FORMAT": "x"}, "cannot listen on 203.0.113.1:2242"),
    ],
)
def test_a_bad_setting_stops_the_start_in_one_line(environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        RUN, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(r"softprompt gateway: .*\n", done.stderr)
    assert message in done.stderr


def test_arguments_are_refused() -> None:
    done = subprocess.run([*RUN, "--port", "1"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "softprompt gateway: no arguments are taken, not '--port': set SOFTPROMPT_GATEWAY_… instead\n"
    )


def test_it_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, softprompt_gateway.__main__; print({'torch', 'transformers', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
