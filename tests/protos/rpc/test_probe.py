"""The command of the containers' health checks: its exit status says whether a server serves."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.tls import ServerTls

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


@pytest.fixture
async def server() -> AsyncIterator[ServiceServer]:
    server = ServiceServer("127.0.0.1:0", [SERVICE])
    await server.start()
    yield server
    await server.stop(0)


async def probe(*arguments: str) -> tuple[int | None, str]:
    """Exit status and what is said on stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "softprompt_api.rpc.probe", *arguments, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await process.communicate()
    return process.returncode, stderr.decode()


async def test_a_server_that_serves_is_0(server: ServiceServer) -> None:
    assert await probe(f"127.0.0.1:{server.port}") == (0, "")


async def test_a_server_that_does_not_serve_yet_is_1(server: ServiceServer) -> None:
    await server.set_serving(False)
    assert await probe(f"127.0.0.1:{server.port}") == (1, "")


async def test_nobody_there_is_1(server: ServiceServer) -> None:
    await server.stop(0)
    assert await probe(f"127.0.0.1:{server.port}") == (1, "")


async def test_a_server_with_tls_is_asked_with_the_certificates_of_the_environment(
    authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.issue()
    server = ServiceServer("127.0.0.1:0", [SERVICE], ServerTls(cert=cert, key=key, client_ca=authority.cert))
    await server.start()
    assert await probe(f"127.0.0.1:{server.port}") == (1, "")
    for name, path in {"CA": authority.cert, "CLIENT_CERT": cert, "CLIENT_KEY": key}.items():
        monkeypatch.setenv(f"SOFTPROMPT_TLS_{name}", str(path))
    assert await probe(f"127.0.0.1:{server.port}") == (0, "")
    await server.stop(0)


@pytest.mark.parametrize("arguments", [(), ("127.0.0.1:1", "127.0.0.1:2")])
async def test_other_arguments_are_told_the_right_ones(arguments: tuple[str, ...]) -> None:
    status, said = await probe(*arguments)
    assert status == 1
    assert "HOST:PORT" in said
