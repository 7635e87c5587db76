"""TLS at the gateway: HTTPS for its clients, and certificates for the services behind it."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from softprompt.gateway import GatewayClient
from softprompt_api.errors import Unavailable
from softprompt_api.rpc.tls import ClientTls, ServerTls
from softprompt_gateway.settings import Settings

REFUSED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)


@pytest.fixture
def files(authority: Any) -> dict[str, Path]:
    """Settings of a gateway that shows a certificate, to its clients and to services."""
    cert, key = authority.issue()
    return {"tls_ca": authority.cert, "tls_client_cert": cert, "tls_client_key": key}


@asynccontextmanager
async def client(port: int, tls: ClientTls | None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of its own connections, that believes what `tls` says and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    verify = context if tls is None else tls.extend(context)
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=verify, timeout=10) as http:
        yield http


async def test_services_are_called_with_a_certificate_and_refuse_who_has_none(
    running_stack: Any, running_gateway: Any, authority: Any, files: dict[str, Path]
) -> None:
    cert, key = authority.issue()
    service_tls = ServerTls(cert=cert, key=key, client_ca=authority.cert)
    async with running_stack(service_tls, **files) as stack:
        await stack.registry.add("loud")
        await stack.until_listed("loud")
        assert (await stack.complete("hello", model="loud")).json()["choices"][0]["text"] == "HELLO"
        addresses = {"registry_address": stack.settings.registry_address}
        addresses["inference_address"] = stack.settings.inference_address
        for other in ({}, {"tls_ca": authority.cert}):
            async with running_gateway(Settings(grace_s=1, **addresses, **other)) as running:
                async with httpx.AsyncClient(timeout=20) as http:
                    answer = await http.get(f"http://127.0.0.1:{running.port}/health/ready")
                assert answer.json() == {
                    "status": "unavailable",
                    "inference": "not serving",
                    "registry": "not serving",
                }


@pytest.fixture
def https(stack: Any, running_gateway: Any, authority: Any) -> Callable[..., Any]:
    """`https(…)` runs a gateway with HTTPS over the stack's services, on the port that it gives."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[int]:
        cert, key = authority.issue()
        addresses = {"registry_address": stack.settings.registry_address}
        addresses["inference_address"] = stack.settings.inference_address
        own = {"tls_cert": cert, "tls_key": key, "grace_s": 1}
        async with running_gateway(Settings(**own | addresses | settings)) as running:
            yield running.port

    return run


async def test_https_answers_whole_and_streamed(stack: Any, https: Any, authority: Any) -> None:
    body = {"model": stack.base, "prompt": "hello", "max_tokens": 100}
    async with https() as port, client(port, ClientTls(ca=authority.cert)) as http:
        whole = await http.post("/v1/completions", json=body)
        assert whole.json()["choices"][0]["text"] == "hello"
        streamed = await http.post("/v1/completions", json={**body, "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")


async def test_without_tls_or_belief_there_is_no_answer(
    stack: Any, https: Any, authority: Any, strange_authority: Any
) -> None:
    async with https() as port:
        async with httpx.AsyncClient() as http:
            with pytest.raises(REFUSED):
                await http.get(f"http://127.0.0.1:{port}/health/live")
        for tls in (None, ClientTls(ca=strange_authority.cert)):
            async with client(port, tls) as http:
                with pytest.raises(httpx.ConnectError):
                    await http.get("/health/live")
        async with client(port, ClientTls(ca=authority.cert)) as http:
            assert (await http.get("/health/live")).status_code == 200


async def test_clients_show_a_certificate_where_they_must(
    stack: Any, https: Any, authority: Any, strange_authority: Any
) -> None:
    async with https(tls_client_ca=authority.cert) as port:
        cert, key = strange_authority.issue()
        for tls in (ClientTls(ca=authority.cert), ClientTls(ca=authority.cert, cert=cert, key=key)):
            async with client(port, tls) as http:
                with pytest.raises(REFUSED):
                    await http.get("/health/live")
        cert, key = authority.issue()
        async with client(port, ClientTls(ca=authority.cert, cert=cert, key=key)) as http:
            assert (await http.get("/health/live")).status_code == 200


@pytest.mark.parametrize(("prompt", "read_bytes"), [("stall", 1), ("flood", 2_000_000)])
async def test_who_leaves_a_stream_is_noticed_through_tls(
    stack: Any, https: Any, authority: Any, prompt: str, read_bytes: int
) -> None:
    body = {"model": stack.base, "prompt": prompt, "max_tokens": 100, "stream": True}
    async with https() as port, client(port, ClientTls(ca=authority.cert)) as http:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for piece in answer.aiter_bytes():
                read_bytes -= len(piece)
                if read_bytes <= 0:
                    break
        await stack.inference.until(lambda fake: fake.cancelled == 1 and not fake.running)


async def test_new_connections_get_a_certificate_that_has_changed(
    stack: Any, https: Any, authority: Any, strange_authority: Any, tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def write(signer: Any) -> None:
        for source, place in zip(signer.issue(), (cert, key), strict=True):
            place.write_bytes(source.read_bytes())

    write(authority)
    async with https(tls_cert=cert, tls_key=key) as port:
        async with client(port, ClientTls(ca=authority.cert)) as http:
            assert (await http.get("/health/live")).status_code == 200
            write(strange_authority)
            async with client(port, ClientTls(ca=strange_authority.cert)) as other:
                assert (await other.get("/health/live")).status_code == 200
            assert (await http.get("/health/live")).status_code == 200, "connections that are open stay so"
        async with client(port, ClientTls(ca=authority.cert)) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/health/live")


async def test_our_own_client_believes_an_authority_of_choice(stack: Any, https: Any, authority: Any) -> None:
    def models(tls: ClientTls | None) -> list[str]:
        with GatewayClient(f"https://127.0.0.1:{port}", tls=tls) as gateway:
            return [model["id"] for model in gateway.models()]

    port = stack.port
    with pytest.raises(Unavailable, match=f"no TLS with https://127.0.0.1:{port}: .*begins with http://"):
        await asyncio.to_thread(models, None)
    async with https() as port:
        assert await asyncio.to_thread(models, ClientTls(ca=authority.cert)) == [stack.base]
        with pytest.raises(Unavailable, match="is refused: unable to get local issuer certificate"):
            await asyncio.to_thread(models, None)
