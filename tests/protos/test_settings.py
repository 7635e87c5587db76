"""Settings are read in one way by every service, and mistakes are told in one plain sentence."""

from typing import Any

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from softprompt_api.rpc.tls import ClientTls, ServerTls
from softprompt_api.settings import (
    ClientTlsSettings,
    SettingsError,
    check_reach,
    is_loopback,
    read,
    refuse_unknown_variables,
)


class Some(BaseSettings):
    """Two settings of an imagined service."""

    model_config = SettingsConfigDict(env_prefix="IMAGINED_", frozen=True, extra="forbid")

    port: int = Field(1, ge=1)
    place: str = "here"


def test_flags_win_over_the_environment_and_that_over_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGINED_PORT", "2")
    assert read(Some).port == 2
    settings = read(Some, ["--port", "3"], program="imagined")
    assert (settings.port, settings.place) == (3, "here")


def test_a_program_without_flags_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["imagined", "--port", "3"])
    assert read(Some).port == 1


@pytest.mark.parametrize("value", ["0", "many"])
def test_a_bad_value_is_told_in_one_line_with_its_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("IMAGINED_PORT", value)
    with pytest.raises(SettingsError, match=r"^port: [^\n]+$"):
        read(Some)


def test_an_unknown_variable_is_named_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unknown_variables(Some)
    monkeypatch.setenv("IMAGINED_PROT", "2")
    with pytest.raises(SettingsError, match="IMAGINED_PROT; known are IMAGINED_PLACE, IMAGINED_PORT"):
        refuse_unknown_variables(Some)


SERVICE = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "50051",
    "SERVICE_PORT_GRPC": "50051",
    "HEADLESS_PORT": "udp://10.0.0.1:50051",
    "PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "PORT_50051_TCP_PROTO": "tcp",
    "PORT_50051_TCP_PORT": "50051",
    "PORT_50051_UDP_ADDR": "10.0.0.1",
}


def test_what_kubernetes_tells_of_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE.items():
        monkeypatch.setenv(f"IMAGINED_{name}", value)
    refuse_unknown_variables(Some)
    monkeypatch.setenv("IMAGINED_PORT", "2")
    refuse_unknown_variables(Some)
    monkeypatch.setenv("IMAGINED_HEADLESS_PORT", "2")
    with pytest.raises(SettingsError, match="unknown setting IMAGINED_HEADLESS_PORT"):
        refuse_unknown_variables(Some)


def test_what_kubernetes_tells_in_the_place_of_a_setting_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGINED_PORT", "tcp://10.0.0.1:50051")
    with pytest.raises(SettingsError, match=r"^IMAGINED_PORT is tcp://.*Kubernetes.*enableServiceLinks: false"):
        refuse_unknown_variables(Some)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:socket"])
def test_this_machine_is_always_allowed(address: str) -> None:
    check_reach(address, allow_remote=False, setting="address", permission="allow_remote")


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "registry:1", "127.evil.example:1", "localhost.evil.example:1"]
)
def test_other_machines_must_be_meant(address: str) -> None:
    with pytest.raises(ValueError, match=r"address .* set allow_remote"):
        check_reach(address, allow_remote=False, setting="address", permission="allow_remote")
    check_reach(address, allow_remote=True, setting="address", permission="allow_remote")


def test_other_machines_may_call_who_asks_them_for_a_certificate(authority: Any) -> None:
    cert, key = authority.issue()
    asks, asks_nobody = ServerTls(cert=cert, key=key, client_ca=authority.cert), ServerTls(cert=cert, key=key)
    check_reach("0.0.0.0:1", allow_remote=False, setting="address", permission="allow_remote", tls=asks)
    with pytest.raises(ValueError, match=r"asks nobody for a certificate; .* TLS with tls_client_ca"):
        check_reach("0.0.0.0:1", allow_remote=False, setting="address", permission="allow_remote", tls=asks_nobody)
    check_reach("0.0.0.0:1", allow_remote=True, setting="address", permission="allow_remote", tls=asks_nobody)


class TestClientTls:
    """What every client of services reads."""

    def test_files_come_from_flags_or_environment(self, monkeypatch: pytest.MonkeyPatch, authority: Any) -> None:
        cert, key = authority.issue()
        monkeypatch.setenv("SOFTPROMPT_TLS_CA", str(authority.cert))
        assert read(ClientTlsSettings).client_tls == ClientTls(ca=authority.cert)
        flags = ["--tls-client-cert", str(cert), "--tls-client-key", str(key)]
        settings = read(ClientTlsSettings, flags, program="imagined")
        assert settings.client_tls == ClientTls(ca=authority.cert, cert=cert, key=key)

    def test_without_them_there_is_no_tls(self) -> None:
        assert read(ClientTlsSettings).client_tls is None

    def test_a_file_that_is_not_there_stops_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOFTPROMPT_TLS_CA", "/no/such.pem")
        with pytest.raises(SettingsError, match=r"^cannot read /no/such.pem: No such file or directory$"):
            read(ClientTlsSettings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_is_reached_from_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "127.example.org", "localhost.example.org", ""])
def test_other_interfaces_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)
