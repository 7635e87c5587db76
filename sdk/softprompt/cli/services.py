"""The three services as commands: how each is started and told its options."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from softprompt_inference.cores import openmp_settings

from softprompt.cli.options import RunOptions
from softprompt.cli.problems import WrongUsage

MODULES: Mapping[str, str] = {
    "registry": "softprompt_registry",
    "inference": "softprompt_inference",
    "gateway": "softprompt_gateway",
}
_GIB = 2**30
# Where services of other systems are called with TLS; those of this one are not.
_CLIENT_TLS = frozenset({"SOFTPROMPT_TLS_CA", "SOFTPROMPT_TLS_CLIENT_CERT", "SOFTPROMPT_TLS_CLIENT_KEY"})
_SERVICE_TLS = re.compile(r"SOFTPROMPT_(GATEWAY|REGISTRY|INFERENCE)_TLS_\w+")
_READ_BY_RUN = frozenset(f"SOFTPROMPT_{name.upper()}" for name in ("config", *RunOptions.model_fields))
# Where other commands find the services of other systems; those of this one are told where its own are.
_CALLED = frozenset({"SOFTPROMPT_REGISTRY_ADDRESS", "SOFTPROMPT_INFERENCE_ADDRESS"})
# What `run` calls the settings of services that have other names.
_OPTIONS: Mapping[str, str] = {
    "SOFTPROMPT_REGISTRY_REDIS_URL": "redis_url",
    "SOFTPROMPT_REGISTRY_ALLOW_FILE_IMPORTS": "allow_file_imports",
    "SOFTPROMPT_REGISTRY_ALLOW_HUB_IMPORTS": "allow_hub_imports",
    "SOFTPROMPT_KV_CACHE_BYTES": "kv_cache_gb",
    "SOFTPROMPT_MAX_NUM_SEQUENCES": "max_num_seqs",
    "SOFTPROMPT_MAX_VIRTUAL_TOKENS": "max_prompt_adapter_token",
    "SOFTPROMPT_GATEWAY_HOST": "host",
    "SOFTPROMPT_GATEWAY_PORT": "port",
    "SOFTPROMPT_GATEWAY_REQUIRE_KEYS": "require_keys",
    "SOFTPROMPT_GATEWAY_INSECURE": "insecure",
    "SOFTPROMPT_GATEWAY_ALLOWED_ORIGINS": "allowed_origins",
    "SOFTPROMPT_GATEWAY_UNKNOWN_FIELDS": "unknown_fields",
}
# Of a GPU that several replicas share, where nothing else is said.
_GPU_SHARE = 0.9
# A service that has not ended this long after SIGTERM is killed; running requests get half of it.
GRACE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the services of one system listen; `redis_url` is where the registry's store is.

    Attributes:
        inference: of each replica.
    """

    redis_url: str
    registry: str
    inference: tuple[str, ...]
    gateway_host: str
    gateway_port: int
    gateway_scheme: str = "http"

    @property
    def gateway_url(self) -> str:
        """The gateway as a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.gateway_host, self.gateway_host)
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{self.gateway_scheme}://{name}:{self.gateway_port}"


def refuse_variables_of_services(options: RunOptions) -> None:
    """WrongUsage for variables that services read which are started alone, and that `run` decides itself."""
    if found := sorted(filter(_SERVICE_TLS.fullmatch, os.environ)):
        raise WrongUsage(
            f"{found[0]} is for a service that is started alone; here services talk on loopback, and "
            "--tls-cert with --tls-key is for the HTTP API"
        )
    nowhere = Addresses(redis_url="", registry="", inference=("",), gateway_host="", gateway_port=0)
    decided = {name for service in MODULES for name in _settings(service, options, nowhere)}
    for name in sorted(decided & set(os.environ) - _READ_BY_RUN - _CALLED):
        if name.endswith("GRACE_S"):
            raise WrongUsage(
                f"{name} is for a service that is started alone; here each has {GRACE_S / 2:g} s to end what runs"
            )
        option = _OPTIONS[name]
        raise WrongUsage(
            f"{name} is for a service that is started alone; here it is --{option.replace('_', '-')}, "
            f"or SOFTPROMPT_{option.upper()}"
        )


def command(service: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of a service, by this interpreter."""
    return [sys.executable, "-m", MODULES[service], *arguments]


def environment(service: str, options: RunOptions, addresses: Addresses, *, replica: int = 0) -> dict[str, str]:
    """The environment of a service: this process's, with the service's settings; None is left to the service.

    Args:
        replica: which of the inference services, from 0.
    """
    # Variables that `run` reads are in `options` by now, and the services refuse variables that they do not know.
    inherited = {name: value for name, value in os.environ.items() if name not in _READ_BY_RUN | _CLIENT_TLS}
    # Records, not lines: the supervisor picks the errors out of the logs.
    return {
        "SOFTPROMPT_LOG_FORMAT": "json",
        **inherited,
        **_settings(service, options, addresses, replica=replica),
    }


def _settings(service: str, options: RunOptions, addresses: Addresses, *, replica: int = 0) -> dict[str, str]:
    make: Mapping[str, Callable[[RunOptions, Addresses], dict[str, object]]] = {
        "registry": _registry,
        "inference": partial(_inference, replica=replica),
        "gateway": _gateway,
    }
    return {name: str(value) for name, value in make[service](options, addresses).items() if value is not None}


def _registry(options: RunOptions, addresses: Addresses) -> dict[str, object]:
    return {
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_REGISTRY_REDIS_URL": addresses.redis_url,
        "SOFTPROMPT_REGISTRY_ALLOW_FILE_IMPORTS": options.allow_file_imports,
        "SOFTPROMPT_REGISTRY_ALLOW_HUB_IMPORTS": options.allow_hub_imports,
        "SOFTPROMPT_REGISTRY_GRACE_S": GRACE_S / 2,
    }


def _inference(options: RunOptions, addresses: Addresses, *, replica: int) -> dict[str, object]:
    devices = options.device.split(",")
    device = devices[replica % len(devices)]
    sharing = [other for other in range(options.replicas) if devices[other % len(devices)] == device]
    num_sharing = len(sharing)
    return {
        "SOFTPROMPT_INFERENCE_ADDRESS": addresses.inference[replica],
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_MODEL": options.model,
        "SOFTPROMPT_SERVED_MODEL_NAME": options.served_model_name,
        "SOFTPROMPT_DEVICE": device,
        "SOFTPROMPT_DTYPE": options.dtype,
        "SOFTPROMPT_NUM_THREADS": _num_threads(num_sharing),
        **_openmp(sharing.index(replica), num_sharing),
        "SOFTPROMPT_KV_CACHE_BYTES": _kv_cache_bytes(options, num_sharing),
        "SOFTPROMPT_GPU_MEMORY_UTILIZATION": _utilization(options, num_sharing),
        "SOFTPROMPT_MAX_MODEL_LEN": options.max_model_len,
        "SOFTPROMPT_MAX_NUM_SEQUENCES": options.max_num_seqs,
        "SOFTPROMPT_ENABLE_PREFIX_CACHING": options.enable_prefix_caching,
        "SOFTPROMPT_SHARE": options.share,
        "SOFTPROMPT_NATIVE_KERNELS": options.native_kernels,
        "SOFTPROMPT_MAX_VIRTUAL_TOKENS": options.max_prompt_adapter_token,
        "SOFTPROMPT_MAX_PROMPT_ADAPTERS": options.max_prompt_adapters,
        "SOFTPROMPT_MAX_LORAS": options.max_loras,
        "SOFTPROMPT_MAX_LORA_RANK": options.max_lora_rank,
        "SOFTPROMPT_GRACE_S": GRACE_S / 2,
    }


def _num_threads(num_sharing: int) -> int | None:
    """Threads of one of several replicas; torch has its own idea of them for one, and users may have another."""
    if num_sharing == 1 or "SOFTPROMPT_NUM_THREADS" in os.environ:
        return None
    return max(1, len(_cpus()) // num_sharing)


def _openmp(place: int, num_sharing: int) -> Mapping[str, str]:
    """Where the threads of one of several replicas run: each on a processor of its own.

    Args:
        place: of the replica, among those that share.
    """
    num_threads, cpus = _num_threads(num_sharing), _cpus()
    if num_threads is None or num_sharing > len(cpus):
        return {}
    own = cpus[place * num_threads : (place + 1) * num_threads]
    return openmp_settings(",".join(f"{{{cpu}}}" for cpu in own))


def _cpus() -> Sequence[int]:
    """Processors that this process may use; not every system tells more than how many there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _kv_cache_bytes(options: RunOptions, num_sharing: int) -> int | None:
    return None if options.kv_cache_gb is None else int(options.kv_cache_gb * _GIB) // num_sharing


def _utilization(options: RunOptions, num_sharing: int) -> float | None:
    """What one of several replicas may take of a GPU; a CPU's memory is planned from what others have left."""
    if num_sharing == 1:
        return options.gpu_memory_utilization
    return (options.gpu_memory_utilization or _GPU_SHARE) / num_sharing


def _gateway(options: RunOptions, addresses: Addresses) -> dict[str, object]:
    return {
        "SOFTPROMPT_GATEWAY_HOST": addresses.gateway_host,
        "SOFTPROMPT_GATEWAY_PORT": addresses.gateway_port,
        "SOFTPROMPT_GATEWAY_TLS_CERT": options.tls_cert,
        "SOFTPROMPT_GATEWAY_TLS_KEY": options.tls_key,
        "SOFTPROMPT_GATEWAY_REQUIRE_KEYS": options.require_keys,
        "SOFTPROMPT_GATEWAY_INSECURE": options.insecure,
        "SOFTPROMPT_GATEWAY_ALLOWED_ORIGINS": options.allowed_origins,
        "SOFTPROMPT_GATEWAY_UNKNOWN_FIELDS": options.unknown_fields,
        "SOFTPROMPT_GATEWAY_LIMITS_REDIS_URL": _limits_redis_url(options),
        "SOFTPROMPT_GATEWAY_GRACE_S": GRACE_S / 2,
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_INFERENCE_ADDRESS": ",".join(addresses.inference),
    }


def _limits_redis_url(options: RunOptions) -> str | None:
    """Where gateways count together, unless users have another store for it.

    The embedded store is this system's alone, and so is its one gateway: it counts by itself.
    """
    return None if "SOFTPROMPT_GATEWAY_LIMITS_REDIS_URL" in os.environ else options.redis_url
