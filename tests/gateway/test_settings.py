"""Settings come from the environment, once, and a mistake stops the start."""

from typing import Any

import pytest
from softprompt_api.rpc.tls import ClientTls, ServerTls
from softprompt_gateway.settings import Settings, SettingsError, read_settings


def test_the_defaults_stay_on_this_machine() -> None:
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 2242)
    assert settings.registry_address == "127.0.0.1:2243"
    assert settings.inference_address == "127.0.0.1:2244"


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_GATEWAY_PORT", "8000")
    monkeypatch.setenv("SOFTPROMPT_REGISTRY_ADDRESS", "registry:1")
    monkeypatch.setenv("SOFTPROMPT_LOG_FORMAT", "json")
    settings = read_settings()
    assert (settings.port, settings.registry_address, settings.log_format) == (8000, "registry:1", "json")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("SOFTPROMPT_GATEWAY_PROT", "1", "SOFTPROMPT_GATEWAY_PROT"),
        ("SOFTPROMPT_GATEWAY_PORT", "x", "port"),
        ("SOFTPROMPT_GATEWAY_PORT", "70000", "port"),
        ("SOFTPROMPT_GATEWAY_HOST", "", "host"),
        ("SOFTPROMPT_GATEWAY_GRACE_S", "-1", "grace_s"),
        ("SOFTPROMPT_GATEWAY_REQUEST_TIMEOUT_S", "inf", "request_timeout_s"),
        ("SOFTPROMPT_LOG_FORMAT", "xml", "SOFTPROMPT_LOG_FORMAT: "),
        ("SOFTPROMPT_INFERENCE_ADDRESS", "", "SOFTPROMPT_INFERENCE_ADDRESS: "),
        ("SOFTPROMPT_INFERENCE_ADDRESS", "a:1,a:1", "SOFTPROMPT_INFERENCE_ADDRESS: .* names a place twice"),
        ("SOFTPROMPT_INFERENCE_ADDRESS", "dns:///inference", "must be dns:///name:port"),
        ("SOFTPROMPT_GATEWAY_ALLOWED_ORIGINS", "app.example", "allowed_origins: .*neither scheme://host, "),
    ],
)
def test_a_mistake_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=named):
        read_settings()


def test_certificates_are_read_at_the_start(monkeypatch: pytest.MonkeyPatch, authority: Any) -> None:
    (cert, key), (own, own_key) = authority.issue(), authority.issue()
    for name, path in {
        "GATEWAY_TLS_CERT": cert,
        "GATEWAY_TLS_KEY": key,
        "TLS_CA": authority.cert,
        "TLS_CLIENT_CERT": own,
        "TLS_CLIENT_KEY": own_key,
    }.items():
        monkeypatch.setenv(f"SOFTPROMPT_{name}", str(path))
    settings = read_settings()
    assert settings.server_tls == ServerTls(cert=cert, key=key)
    assert settings.client_tls == ClientTls(ca=authority.cert, cert=own, key=own_key)
    monkeypatch.setenv("SOFTPROMPT_GATEWAY_TLS_KEY", str(own_key))
    with pytest.raises(
        SettingsError, match=f"the private key in {own_key} is not that of the certificate in {cert}"
    ):
        read_settings()


def test_replicas_are_named_one_by_one_or_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_INFERENCE_ADDRESS", "a:1, unix:/b, dns:///c:3")
    places = read_settings().inference_places
    assert (places.fixed, places.names) == (("a:1", "unix:/b"), (("c", 3),))


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]
