"""TLS on real sockets: who is believed, who is let in, and what becomes of certificates that change."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.channel import open_blocking_channel, open_channel
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.tls import ClientTls, Followed, ServerTls

SERVICE = pb.DESCRIPTOR.services_by_name["RegistryService"]


@asynccontextmanager
async def serving(tls: ServerTls | None) -> AsyncIterator[str]:
    """A server that has nothing but its health; its address."""
    server = ServiceServer("127.0.0.1:0", [SERVICE], tls)
    await server.start()
    yield f"127.0.0.1:{server.port}"
    await server.stop(0)


async def ask(address: str, tls: ClientTls | None) -> grpc.StatusCode:
    """How a call ends."""
    async with open_channel(address, tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def server_tls(authority: Any) -> ServerTls:
    cert, key = authority.issue()
    return ServerTls(cert=cert, key=key)


@pytest.fixture(scope="module")
def mutual_tls(authority: Any, server_tls: ServerTls) -> ServerTls:
    """It asks clients for a certificate of the same authority."""
    return ServerTls(cert=server_tls.cert, key=server_tls.key, client_ca=authority.cert)


@pytest.fixture(scope="module")
def client_tls(authority: Any) -> ClientTls:
    cert, key = authority.issue()
    return ClientTls(ca=authority.cert, cert=cert, key=key)


async def test_who_believes_the_authority_is_served(authority: Any, server_tls: ServerTls) -> None:
    async with serving(server_tls) as address:
        assert await ask(address, ClientTls(ca=authority.cert)) is grpc.StatusCode.OK
        blocking = asyncio.to_thread(ask_blocking, address, ClientTls(ca=authority.cert))
        assert await blocking == health_pb2.HealthCheckResponse.SERVING


def ask_blocking(address: str, tls: ClientTls) -> int:
    with open_blocking_channel(address, tls) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        return int(answer.status)


async def test_a_server_of_another_authority_is_not_believed(
    strange_authority: Any, server_tls: ServerTls
) -> None:
    async with serving(server_tls) as address:
        assert await ask(address, ClientTls(ca=strange_authority.cert)) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_with_another_name_is_not_believed(authority: Any) -> None:
    cert, key = authority.issue(names="DNS:registry.example")
    async with serving(ServerTls(cert=cert, key=key)) as address:
        assert await ask(address, ClientTls(ca=authority.cert)) is grpc.StatusCode.UNAVAILABLE


async def test_without_tls_a_server_with_it_is_not_reached_and_the_other_way_round(
    server_tls: ServerTls, client_tls: ClientTls
) -> None:
    async with serving(server_tls) as with_tls, serving(None) as without:
        assert await ask(with_tls, None) is grpc.StatusCode.UNAVAILABLE
        assert await ask(without, client_tls) is grpc.StatusCode.UNAVAILABLE
        assert await ask(without, None) is grpc.StatusCode.OK


async def test_who_is_asked_for_a_certificate_must_have_one_of_the_authority(
    authority: Any, strange_authority: Any, mutual_tls: ServerTls, client_tls: ClientTls
) -> None:
    cert, key = strange_authority.issue()
    async with serving(mutual_tls) as address:
        assert await ask(address, client_tls) is grpc.StatusCode.OK
        assert await ask(address, ClientTls(ca=authority.cert)) is grpc.StatusCode.UNAVAILABLE
        assert await ask(address, ClientTls(ca=authority.cert, cert=cert, key=key)) is grpc.StatusCode.UNAVAILABLE
        assert await ask(address, None) is grpc.StatusCode.UNAVAILABLE


async def test_new_connections_get_certificates_that_have_changed(
    authority: Any, strange_authority: Any, tmp_path: Path
) -> None:
    files = ServerTls(cert=tmp_path / "cert.pem", key=tmp_path / "key.pem", client_ca=tmp_path / "ca.pem")
    believers = [ClientTls(ca=one.cert, **pair_of(one)) for one in (authority, strange_authority)]
    write(files, authority)
    async with serving(files) as address:
        assert await ask(address, believers[0]) is grpc.StatusCode.OK
        write(files, strange_authority)
        assert await ask(address, believers[1]) is grpc.StatusCode.OK
        assert await ask(address, believers[0]) is grpc.StatusCode.UNAVAILABLE
        files.key.write_text("no key")
        with structlog.testing.capture_logs() as logged:
            assert await ask(address, believers[1]) is grpc.StatusCode.OK
        assert [entry["log_level"] for entry in logged] == ["error"]


def pair_of(authority: Any) -> dict[str, Path]:
    cert, key = authority.issue()
    return {"cert": cert, "key": key}


def write(files: ServerTls, authority: Any) -> None:
    cert, key = authority.issue()
    assert files.client_ca is not None
    for source, place in ((cert, files.cert), (key, files.key), (authority.cert, files.client_ca)):
        shutil.copy(source, place)


def test_what_files_make_is_made_anew_only_when_they_have_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    followed = Followed([path], lambda: int(path.read_text()))
    assert followed.renewed() is None
    path.write_text("22")
    assert (followed.renewed(), followed.renewed()) == (22, None)
    with structlog.testing.capture_logs() as logged:
        path.write_text("none")
        assert (followed.renewed(), followed.renewed()) == (None, None)
        path.unlink()
        assert (followed.renewed(), followed.renewed()) == (None, None)
    assert len(logged) == 2, "each change is told once"
    path.write_text("4444")
    assert followed.renewed() == 4444


class TestFiles:
    """Files that cannot be used are named, each with its reason."""

    def test_what_is_unset_is_no_tls(self) -> None:
        assert ServerTls.of(None, None, None) is None
        assert ClientTls.of(None, None, None) is None

    def test_what_is_whole_is_tls(self, authority: Any) -> None:
        cert, key = authority.issue()
        server = ServerTls.of(cert, key, authority.cert)
        assert server == ServerTls(cert=cert, key=key, client_ca=authority.cert)
        assert server.ssl_context().verify_mode is ssl.CERT_REQUIRED
        assert ClientTls.of(authority.cert, cert, key) == ClientTls(ca=authority.cert, cert=cert, key=key)

    def test_settings_that_need_each_other_are_named(self, authority: Any) -> None:
        cert, key = authority.issue()
        for given in ((cert, None, None), (None, key, None), (None, None, authority.cert)):
            with pytest.raises(ValueError, match="inference_tls_cert and inference_tls_key are needed"):
                ServerTls.of(*given, prefix="inference_")
        with pytest.raises(ValueError, match="tls_client_cert and tls_client_key are needed"):
            ClientTls.of(authority.cert, cert, None)
        with pytest.raises(ValueError, match="tls_client_cert needs tls_ca"):
            ClientTls.of(None, cert, key)

    def test_a_file_that_cannot_be_read_is_named(self, authority: Any, tmp_path: Path) -> None:
        cert, key = authority.issue()
        missing = tmp_path / "missing.pem"
        for given in ((missing, key, None), (cert, missing, None), (cert, key, missing)):
            with pytest.raises(ValueError, match=rf"cannot read {missing}: No such file"):
                ServerTls.of(*given)
        with pytest.raises(ValueError, match=rf"cannot read {missing}: No such file"):
            ClientTls.of(missing, None, None)
        with pytest.raises(ValueError, match=rf"cannot read {tmp_path}: Is a directory"):
            ClientTls.of(tmp_path, None, None)

    def test_a_key_of_another_certificate_is_told(self, authority: Any) -> None:
        (cert, key), (_, other) = authority.issue(), authority.issue()
        with pytest.raises(
            ValueError, match=f"the private key in {other} is not that of the certificate in {cert}"
        ):
            ServerTls.of(cert, other, None)
        with pytest.raises(ValueError, match="is not that of the certificate"):
            ClientTls.of(authority.cert, cert, other)
        assert ServerTls.of(cert, key, None) is not None

    @pytest.mark.parametrize(
        "text", ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    )
    def test_what_is_no_certificate_is_told(self, authority: Any, tmp_path: Path, text: str) -> None:
        cert, key = authority.issue()
        odd = tmp_path / "odd.pem"
        odd.write_text(text)
        for given in ((odd, key), (cert, odd), (key, cert)):
            with pytest.raises(ValueError, match="must be a certificate and its private key as PEM"):
                ServerTls.of(*given, None)
        for ca in (odd, key):
            with pytest.raises(ValueError, match=f"there is no certificate as PEM in {ca}"):
                ClientTls.of(ca, None, None)

    def test_a_key_with_a_password_is_refused_and_not_asked_for(self, authority: Any, tmp_path: Path) -> None:
        cert, key = authority.issue()
        locked = tmp_path / "locked.key"
        lock(key, locked)
        with pytest.raises(ValueError, match="the key without a password"):
            ServerTls.of(cert, locked, None)


def lock(key: Path, locked: Path) -> None:
    words = ("openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked))
    subprocess.run(words, check=True, capture_output=True)
