"""The containers are told nothing that their services do not know, and are checked in a way that works."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import softprompt_gateway.settings
import softprompt_inference.settings
import softprompt_registry.settings
import yaml
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

ROOT = Path(__file__).parent.parent
FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
SETTINGS: dict[str, tuple[type[BaseSettings], Callable[[], BaseSettings]]] = {
    "registry": (softprompt_registry.settings.Settings, softprompt_registry.settings.read_settings),
    "inference": (softprompt_inference.settings.Settings, softprompt_inference.settings.read_settings),
    "gateway": (softprompt_gateway.settings.Settings, softprompt_gateway.settings.read_settings),
}


class ComposeLoader(yaml.SafeLoader):
    """Safe YAML with compose's own tag that takes an inherited value away."""


ComposeLoader.add_constructor("!reset", lambda _loader, _node: None)


def services(file: str) -> dict[str, Any]:
    """The services of a compose file by name."""
    loader = ComposeLoader((ROOT / file).read_text(encoding="utf-8"))
    return loader.get_single_data()["services"]


def environment(file: str, service: str) -> dict[str, str | None]:
    """Our variables as the service is given them, with the defaults that compose fills in; None: passed on."""
    given = services(file).get(service, {}).get("environment", {})
    return {
        name: None if value is None else re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value))
        for name, value in given.items()
        if name.startswith("SOFTPROMPT_")
    }


def test_a_replica_is_told_its_share_where_compose_is_called() -> None:
    given = environment("docker-compose.yml", "inference")
    assert [given[f"SOFTPROMPT_{name}"] for name in ("NUM_THREADS", "GPU_MEMORY_UTILIZATION")] == [None, None]


def variables(settings: type[BaseSettings]) -> set[str]:
    """Every variable that some settings are read from."""
    names = set()
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        spellings = (
            alias.choices if isinstance(alias, AliasChoices) else [f"{settings.model_config['env_prefix']}{name}"]
        )
        names |= {str(spelling).upper() for spelling in spellings}
    return names


def test_the_store_keeps_every_acknowledged_write() -> None:
    store = services("docker-compose.yml")["store"]
    command = " ".join(store["command"])
    assert "--appendonly yes --appendfsync always --maxmemory-policy noeviction" in command
    assert store["volumes"] == ["store:/data"]


@pytest.mark.parametrize("service", SETTINGS)
@pytest.mark.parametrize("file", FILES)
def test_a_service_knows_every_variable_it_is_given_and_starts_with_them(
    monkeypatch: pytest.MonkeyPatch, file: str, service: str
) -> None:
    for name in [name for name in os.environ if name.startswith("SOFTPROMPT_")]:
        monkeypatch.delenv(name)
    settings, read = SETTINGS[service]
    given = {**environment("docker-compose.yml", service), **environment(file, service)}
    assert given
    assert set(given) - variables(settings) == set()
    for name, value in given.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    read()


def test_services_find_each_other_under_their_names_and_ports() -> None:
    registry, inference, gateway = (environment("docker-compose.yml", service) for service in SETTINGS)
    registry_port = registry["SOFTPROMPT_REGISTRY_ADDRESS"].rpartition(":")[2]
    inference_port = inference["SOFTPROMPT_INFERENCE_ADDRESS"].rpartition(":")[2]
    assert inference["SOFTPROMPT_REGISTRY_ADDRESS"] == f"registry:{registry_port}"
    assert gateway["SOFTPROMPT_REGISTRY_ADDRESS"] == f"registry:{registry_port}"
    # Every container of a service that is scaled has its name.
    assert gateway["SOFTPROMPT_INFERENCE_ADDRESS"] == f"dns:///inference:{inference_port}"


def test_gateways_do_not_count_in_the_store_that_waits_for_its_disk() -> None:
    registry, gateway = (environment("docker-compose.yml", service) for service in ("registry", "gateway"))
    store = registry["SOFTPROMPT_REGISTRY_REDIS_URL"].rpartition("/")[0]
    assert not gateway.get("SOFTPROMPT_GATEWAY_LIMITS_REDIS_URL", "").startswith(store)


def test_kernels_can_be_compiled_where_they_run() -> None:
    lines = (ROOT / "docker" / "inference.Dockerfile").read_text(encoding="utf-8").splitlines()
    [install] = [line for line in lines if "apt-get install" in line]
    assert {"gcc", "libc6-dev", "--no-install-recommends"} <= set(install.split())
    assert install.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("service", ["store", *SETTINGS])
def test_every_service_has_a_health_check_and_is_waited_for(service: str) -> None:
    described = services("docker-compose.yml")
    assert described[service]["healthcheck"]["test"][0] == "CMD"
    waits = [waiter.get("depends_on", {}).get(service) for waiter in described.values()]
    assert all(wait == {"condition": "service_healthy"} for wait in waits if wait is not None)


@pytest.mark.parametrize("file", FILES)
def test_what_is_built_is_there(file: str) -> None:
    builds = [service["build"] for service in services(file).values() if "build" in service]
    assert builds
    for build in builds:
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()


def test_the_gpu_is_asked_for_and_can_be_left_out() -> None:
    assert services("docker-compose.yml")["inference"]["runtime"] == "nvidia"
    assert services("docker-compose.cpu.yml")["inference"]["runtime"] is None
