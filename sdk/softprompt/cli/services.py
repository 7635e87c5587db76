"""The three services as commands: how each is started and told its options."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
# A service that has not ended this long after SIGTERM is killed; running requests get half of it.
GRACE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the services of one system listen; `redis_url` is where the registry's store is."""

    redis_url: str
    registry: str
    inference: str
    gateway_host: str
    gateway_port: int
    gateway_scheme: str = "http"

    @property
    def gateway_url(self) -> str:
        """The gateway as a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.gateway_host, self.gateway_host)
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{self.gateway_scheme}://{name}:{self.gateway_port}"


def refuse_tls_of_services() -> None:
    """WrongUsage for variables that would give services TLS with which this command does not call them."""
    if found := sorted(filter(_SERVICE_TLS.fullmatch, os.environ)):
        raise WrongUsage(
            f"{found[0]} is for a service that is started alone; here services talk on loopback, and "
            "--tls-cert with --tls-key is for the HTTP API"
        )


def command(service: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of a service, by this interpreter."""
    return [sys.executable, "-m", MODULES[service], *arguments]


def environment(service: str, options: RunOptions, addresses: Addresses) -> dict[str, str]:
    """The environment of a service: this process's, with the service's settings; None is left to the service."""
    # Variables that `run` reads are in `options` by now, and the services refuse variables that they do not know.
    own = {f"SOFTPROMPT_{name.upper()}" for name in ("config", *RunOptions.model_fields)}
    inherited = {name: value for name, value in os.environ.items() if name not in own | _CLIENT_TLS}
    settings = {
        "registry": _registry,
        "inference": _inference,
        "gateway": _gateway,
    }[service](options, addresses)
    given = {name: str(value) for name, value in settings.items() if value is not None}
    # Records, not lines: the supervisor picks the errors out of the logs.
    return {"SOFTPROMPT_LOG_FORMAT": "json", **inherited, **given}


def _registry(options: RunOptions, addresses: Addresses) -> dict[str, object]:
    return {
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_REGISTRY_REDIS_URL": addresses.redis_url,
        "SOFTPROMPT_REGISTRY_ALLOW_FILE_IMPORTS": options.allow_file_imports,
        "SOFTPROMPT_REGISTRY_ALLOW_HUB_IMPORTS": options.allow_hub_imports,
        "SOFTPROMPT_REGISTRY_GRACE_S": GRACE_S / 2,
    }


def _inference(options: RunOptions, addresses: Addresses) -> dict[str, object]:
    return {
        "SOFTPROMPT_INFERENCE_ADDRESS": addresses.inference,
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_MODEL": options.model,
        "SOFTPROMPT_SERVED_MODEL_NAME": options.served_model_name,
        "SOFTPROMPT_DEVICE": options.device,
        "SOFTPROMPT_DTYPE": options.dtype,
        "SOFTPROMPT_KV_CACHE_BYTES": None if options.kv_cache_gb is None else int(options.kv_cache_gb * _GIB),
        "SOFTPROMPT_GPU_MEMORY_UTILIZATION": options.gpu_memory_utilization,
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


def _gateway(options: RunOptions, addresses: Addresses) -> dict[str, object]:
    return {
        "SOFTPROMPT_GATEWAY_HOST": addresses.gateway_host,
        "SOFTPROMPT_GATEWAY_PORT": addresses.gateway_port,
        "SOFTPROMPT_GATEWAY_TLS_CERT": options.tls_cert,
        "SOFTPROMPT_GATEWAY_TLS_KEY": options.tls_key,
        "SOFTPROMPT_GATEWAY_REQUIRE_KEYS": options.require_keys,
        "SOFTPROMPT_GATEWAY_INSECURE": options.insecure,
        # The embedded store is this system's alone, and so is its one gateway: it counts by itself.
        "SOFTPROMPT_GATEWAY_LIMITS_REDIS_URL": options.redis_url,
        "SOFTPROMPT_GATEWAY_GRACE_S": GRACE_S / 2,
        "SOFTPROMPT_REGISTRY_ADDRESS": addresses.registry,
        "SOFTPROMPT_INFERENCE_ADDRESS": addresses.inference,
    }
