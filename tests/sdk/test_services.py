"""How options reach the services, and how a client reaches the gateway."""

import dataclasses
import importlib
import os
from dataclasses import replace
from typing import Any

import pytest
from softprompt.cli import main
from softprompt.cli.options import RunOptions, make_options
from softprompt.cli.panel import curl
from softprompt.cli.problems import WrongUsage
from softprompt.cli.services import Addresses, command, environment, refuse_variables_of_services
from softprompt.registry import AdapterInfo
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.registry.v1.registry_pb2 import BaseModel

EVERY_OPTION = {
    "max_prompt_adapters": 2,
    "max_loras": 5,
    "max_lora_rank": 128,
    "max_num_seqs": 3,
    "served_model_name": "x",
    "dtype": "float32",
    "kv_cache_gb": 1.0,
    "gpu_memory_utilization": 0.5,
    "enable_prefix_caching": False,
    "share": False,
    "native_kernels": False,
    "require_keys": True,
    "unknown_fields": "warn",
    "redis_url": "redis://elsewhere",
}
CALLED = {"SOFTPROMPT_REGISTRY_ADDRESS", "SOFTPROMPT_INFERENCE_ADDRESS"}


def addresses(host: str = "127.0.0.1") -> Addresses:
    return Addresses(
        redis_url="unix:///store.sock",
        registry="127.0.0.1:1",
        inference=("127.0.0.1:2", "127.0.0.1:4"),
        gateway_host=host,
        gateway_port=3,
    )


def test_options_become_settings_and_what_is_not_given_is_left_to_the_service() -> None:
    options = make_options({"model": "m", "kv_cache_gb": 0.5, "max_prompt_adapter_token": 8})
    settings = environment("inference", options, addresses())
    assert settings["SOFTPROMPT_MODEL"] == "m"
    assert settings["SOFTPROMPT_KV_CACHE_BYTES"] == str(2**29)
    assert settings["SOFTPROMPT_MAX_VIRTUAL_TOKENS"] == "8"
    assert "SOFTPROMPT_MAX_MODEL_LEN" not in settings


def test_variables_that_run_reads_do_not_reach_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    # The registry refuses variables of its prefix that it does not know.
    monkeypatch.setenv("SOFTPROMPT_REGISTRY_PORT", "9")
    monkeypatch.setenv("SOFTPROMPT_MAX_MODEL_LEN", "9")
    monkeypatch.setenv("SOFTPROMPT_NUM_THREADS", "1")
    for service in ("registry", "inference", "gateway"):
        settings = environment(service, make_options({}), addresses())
        assert "SOFTPROMPT_REGISTRY_PORT" not in settings
        assert "SOFTPROMPT_MAX_MODEL_LEN" not in settings
        assert settings["SOFTPROMPT_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("registry", {"address": "127.0.0.1:1", "redis_url": "unix:///store.sock"}),
        (
            "gateway",
            {
                "host": "127.0.0.1",
                "port": 3,
                "registry_address": "127.0.0.1:1",
                "inference_address": "127.0.0.1:2,127.0.0.1:4",
                "require_keys": True,
                "insecure": False,
                "unknown_fields": "warn",
                "limits_redis_url": "redis://elsewhere",
            },
        ),
        (
            "inference",
            {
                "inference_address": "127.0.0.1:2",
                "registry_address": "127.0.0.1:1",
                "model_id": "x",
                "dtype": "float32",
                "kv_cache_bytes": 2**30,
                "gpu_memory_utilization": 0.5,
                "max_num_sequences": 3,
                "max_prompt_adapters": 2,
                "max_virtual_tokens": 512,
                "max_loras": 5,
                "max_lora_rank": 128,
                "enable_prefix_caching": False,
                "share": False,
                "native_kernels": False,
            },
        ),
    ],
)
def test_every_service_reads_what_it_is_given(
    service: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(service, make_options(EVERY_OPTION), addresses()).items():
        monkeypatch.setenv(name, value)
    settings = importlib.import_module(f"softprompt_{service}.settings").read_settings()
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.log_format == "json"


def test_replicas_share_processors_and_the_memory_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)  # of which this process may use five
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 60}, raising=False)
    options = make_options({"replicas": 2, "kv_cache_gb": 3.0})
    for replica, address in enumerate(addresses().inference):
        settings = environment("inference", options, addresses(), replica=replica)
        assert settings["SOFTPROMPT_INFERENCE_ADDRESS"] == address
        assert settings["SOFTPROMPT_NUM_THREADS"] == "2"
        assert (settings["OMP_PROC_BIND"], settings["OMP_PLACES"]) == ("true", ("{0},{1}", "{2},{3}")[replica])
        assert settings["SOFTPROMPT_KV_CACHE_BYTES"] == str(3 * 2**29)
        assert settings["SOFTPROMPT_GPU_MEMORY_UTILIZATION"] == "0.45"


def test_devices_are_given_to_replicas_in_turn_and_shared_by_those_that_have_the_same() -> None:
    three = dataclasses.replace(addresses(), inference=("a:1", "b:1", "c:1"))
    options = make_options({"replicas": 3, "device": "cuda:0,cuda:1", "gpu_memory_utilization": 0.8})
    settings = [environment("inference", options, three, replica=replica) for replica in range(3)]
    assert [one["SOFTPROMPT_DEVICE"] for one in settings] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [one["SOFTPROMPT_GPU_MEMORY_UTILIZATION"] for one in settings] == ["0.4", "0.8", "0.4"]


@pytest.mark.parametrize(("setting", "num_cpus"), [("OMP_PROC_BIND", 4), ("GOMP_CPU_AFFINITY", 4), (None, 1)])
def test_threads_of_replicas_run_where_users_say_and_anywhere_if_there_are_too_few_processors(
    setting: str | None, num_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cpus)), raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "false")
    settings = environment("inference", make_options({"replicas": 2}), addresses(), replica=1)
    assert "OMP_PLACES" not in settings
    assert settings.get("OMP_PROC_BIND") == os.environ.get("OMP_PROC_BIND")


def test_one_replica_has_the_whole_machine() -> None:
    settings = environment("inference", make_options({}), addresses())
    assert "OMP_PLACES" not in settings
    assert "SOFTPROMPT_NUM_THREADS" not in settings
    assert "SOFTPROMPT_GPU_MEMORY_UTILIZATION" not in settings


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:3"),
        ("0.0.0.0", "http://127.0.0.1:3"),
        ("::", "http://[::1]:3"),
        ("fe80::1", "http://[fe80::1]:3"),
        ("localhost", "http://localhost:3"),
    ],
)
def test_the_gateways_url_can_be_reached_from_this_machine(host: str, url: str) -> None:
    assert addresses(host).gateway_url == url


def test_https_is_the_gateways_alone(monkeypatch: pytest.MonkeyPatch, authority: Any) -> None:
    cert, key = map(str, authority.issue())
    monkeypatch.setenv("SOFTPROMPT_TLS_CA", str(authority.cert))  # for commands that call other systems
    options = make_options({"tls_cert": cert, "tls_key": key})
    given = {
        service: environment(service, options, addresses()) for service in ("registry", "inference", "gateway")
    }
    told = {(service, name) for service, settings in given.items() for name in settings if "_TLS_" in name}
    assert told == {("gateway", "SOFTPROMPT_GATEWAY_TLS_CERT"), ("gateway", "SOFTPROMPT_GATEWAY_TLS_KEY")}
    assert replace(addresses(), gateway_scheme="https").gateway_url == "https://127.0.0.1:3"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("SOFTPROMPT_REGISTRY_TLS_CERT", "--tls-cert with --tls-key is for the HTTP API"),
        ("SOFTPROMPT_GATEWAY_REQUIRE_KEYS", "--require-keys, or SOFTPROMPT_REQUIRE_KEYS"),
        ("SOFTPROMPT_GATEWAY_INSECURE", "--insecure, or SOFTPROMPT_INSECURE"),
        ("SOFTPROMPT_GATEWAY_HOST", "--host, or SOFTPROMPT_HOST"),
        ("SOFTPROMPT_GATEWAY_PORT", "--port, or SOFTPROMPT_PORT"),
        ("SOFTPROMPT_GATEWAY_UNKNOWN_FIELDS", "--unknown-fields, or SOFTPROMPT_UNKNOWN_FIELDS"),
        ("SOFTPROMPT_REGISTRY_REDIS_URL", "--redis-url, or SOFTPROMPT_REDIS_URL"),
        ("SOFTPROMPT_REGISTRY_ALLOW_FILE_IMPORTS", "--allow-file-imports, or SOFTPROMPT_ALLOW_FILE_IMPORTS"),
        ("SOFTPROMPT_REGISTRY_ALLOW_HUB_IMPORTS", "--allow-hub-imports, or SOFTPROMPT_ALLOW_HUB_IMPORTS"),
        (
            "SOFTPROMPT_MAX_VIRTUAL_TOKENS",
            "--max-prompt-adapter-token, or SOFTPROMPT_MAX_PROMPT_ADAPTER_TOKEN",
        ),
        ("SOFTPROMPT_MAX_NUM_SEQUENCES", "--max-num-seqs, or SOFTPROMPT_MAX_NUM_SEQS"),
        ("SOFTPROMPT_KV_CACHE_BYTES", "--kv-cache-gb, or SOFTPROMPT_KV_CACHE_GB"),
        ("SOFTPROMPT_GATEWAY_GRACE_S", "here each has 5 s to end what runs"),
        ("SOFTPROMPT_REGISTRY_GRACE_S", "here each has 5 s to end what runs"),
        ("SOFTPROMPT_GRACE_S", "here each has 5 s to end what runs"),
    ],
)
def test_variables_that_run_would_overwrite_are_refused_by_name(
    name: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make_options({**EVERY_OPTION, "allow_file_imports": "/"})
    refuse_variables_of_services(options)
    monkeypatch.setenv(name, "x")
    with pytest.raises(WrongUsage, match=f"^{name} is for a service that is started alone; .*{instead}$"):
        refuse_variables_of_services(options)


def test_every_variable_that_run_sets_is_its_own_or_refused_or_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = make_options({**EVERY_OPTION, "replicas": 2, "allow_file_imports": "/"})
    services = ("registry", "inference", "gateway")
    given = [name for service in services for name in environment(service, options, addresses())]
    kept = {"SOFTPROMPT_NUM_THREADS", "SOFTPROMPT_GATEWAY_LIMITS_REDIS_URL", "SOFTPROMPT_LOG_FORMAT"}
    for name in [name for name in given if name.startswith("SOFTPROMPT_")]:
        with monkeypatch.context() as patched:
            patched.setenv(name, "x")
            if name in kept:
                settings = [environment(service, options, addresses()) for service in services]
                assert {one[name] for one in settings} == {"x"}
            elif name.removeprefix("SOFTPROMPT_").lower() not in RunOptions.model_fields and name not in CALLED:
                with pytest.raises(WrongUsage, match=name):
                    refuse_variables_of_services(options)


def test_what_other_commands_call_and_what_no_option_decides_is_no_wrong_usage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in CALLED | {"SOFTPROMPT_MAX_NUM_SEQUENCES", "SOFTPROMPT_NUM_THREADS", "SOFTPROMPT_PORT"}:
        monkeypatch.setenv(name, "x")
    refuse_variables_of_services(make_options({}))


def test_a_service_alone_is_told_how_others_are_called(
    monkeypatch: pytest.MonkeyPatch, authority: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOFTPROMPT_TLS_CA", "of others")  # which is undone, whatever the command makes of it

    def become(_program: str, line: list[str]) -> None:
        print(os.environ["SOFTPROMPT_TLS_CA"], line[-1])

    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(SystemExit):
        main(["--tls-ca", str(authority.cert), "serve", "gateway", "--port", "0"])
    assert capsys.readouterr().out == f"{authority.cert} 0\n"


def test_the_command_that_a_start_shows_can_be_run() -> None:
    model = GetModelResponse(base_model=BaseModel(id="base"))
    assert '"model": "base"' in curl(addresses(), model, [], needs_key=False)
    several = AdapterInfo(**{field.name: None for field in dataclasses.fields(AdapterInfo)})
    several = replace(several, name="several", num_tasks=3)
    shown = curl(addresses(), model, [several], needs_key=True)
    assert '"model": "several:0"' in shown
    assert '-H "Authorization: Bearer $SOFTPROMPT_API_KEY"' in shown


def test_a_service_runs_as_a_module_of_this_interpreter() -> None:
    assert command("gateway", ["--help"])[1:] == ["-m", "softprompt_gateway", "--help"]
