"""Settings come from flags, then the environment; what cannot be stops the start with a plain sentence."""

from pathlib import Path
from typing import Any

import pytest
from softprompt_api.rpc.tls import ClientTls, ServerTls
from softprompt_inference.settings import Settings, SettingsError, read_settings


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("SOFTPROMPT_"):
            monkeypatch.delenv(name)


def test_the_defaults_listen_on_this_machine_alone() -> None:
    settings = read_settings()
    assert settings.inference_address == "127.0.0.1:2244"
    assert settings.registry_address == "127.0.0.1:2243"
    assert settings.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_REGISTRY_ADDRESS", "registry:2243")
    monkeypatch.setenv("SOFTPROMPT_MAX_MODEL_LEN", "512")
    settings = read_settings()
    assert (settings.registry_address, settings.max_model_len) == ("registry:2243", 512)


def test_prefix_caching_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().engine_config(Path("m")).enable_prefix_caching
    assert not read_settings(["--no-enable-prefix-caching"]).engine_config(Path("m")).enable_prefix_caching
    monkeypatch.setenv("SOFTPROMPT_ENABLE_PREFIX_CACHING", "false")
    assert not read_settings().engine_config(Path("m")).enable_prefix_caching


def test_sharing_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().engine_config(Path("m")).share
    config = read_settings(["--no-share"]).engine_config(Path("m"))
    assert (config.share, config.enable_prefix_caching) == (False, True)
    monkeypatch.setenv("SOFTPROMPT_SHARE", "false")
    assert not read_settings().engine_config(Path("m")).share


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_DEVICE", "cuda")
    assert read_settings(["--device", "cpu"]).device == "cpu"


@pytest.mark.parametrize(("spelled", "size_bytes"), [("4GiB", 4 * 2**30), ("1048576", 2**20)])
def test_sizes_may_have_units(spelled: str, size_bytes: int) -> None:
    assert read_settings(["--kv-cache-bytes", spelled]).engine_config(Path("m")).kv_cache_bytes == size_bytes


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--max-virtual-tokens", "0", "max_virtual_tokens"),
        ("--max-loras", "-1", "max_loras"),
        ("--max-lora-rank", "1025", "max_lora_rank"),
        ("--max-num-sequences", "many", "max_num_sequences"),
        ("--device", "tpu", "device"),
        ("--dtype", "int8", "dtype"),
        ("--grace-s", "-1", "grace_s"),
        ("--inference-address", "0.0.0.0:2244", "inference_address"),
        ("--max-adapter-rows", "511", "max_adapter_rows"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(flag: str, value: str, name: str) -> None:
    with pytest.raises((SettingsError, SystemExit)) as caught:
        read_settings([flag, value])
    assert isinstance(caught.value, SystemExit) or name in str(caught.value)


def test_an_unknown_flag_stops_the_start() -> None:
    with pytest.raises(SystemExit):
        read_settings(["--bogus", "1"])


def test_other_machines_are_let_in_only_when_told_so() -> None:
    settings = read_settings(["--inference-address", "0.0.0.0:2244", "--inference-allow-remote"])
    assert settings.inference_address == "0.0.0.0:2244"


def test_other_machines_are_let_in_where_they_need_a_certificate(
    authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = authority.issue()
    monkeypatch.setenv("SOFTPROMPT_INFERENCE_TLS_CERT", str(cert))
    monkeypatch.setenv("SOFTPROMPT_INFERENCE_TLS_KEY", str(key))
    address = ["--inference-address", "0.0.0.0:2244"]
    with pytest.raises(SettingsError, match="TLS with inference_tls_client_ca, or set inference_allow_remote"):
        read_settings(address)
    settings = read_settings([*address, "--inference-tls-client-ca", str(authority.cert)])
    assert settings.server_tls == ServerTls(cert=cert, key=key, client_ca=authority.cert)
    assert settings.client_tls is None


def test_the_registry_is_called_with_tls_where_its_authority_is_named(authority: Any) -> None:
    settings = read_settings(["--tls-ca", str(authority.cert)])
    assert settings.client_tls == ClientTls(ca=authority.cert)
    assert settings.server_tls is None


def test_a_folder_is_served_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert Settings(model=str(folder)).model_id == "my-model"


def test_a_gguf_file_is_served_under_its_name_without_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "my-model.Q4_1.gguf").touch()
    assert Settings(model=str(tmp_path / "my-model.Q4_1.gguf")).model_id == "my-model.Q4_1"


def test_the_public_name_can_be_chosen() -> None:
    assert Settings(model="org/model", served_model_name="mine").model_id == "mine"
    assert Settings(model="org/model").model_id == "org/model"
