"""`softprompt run`: everything on one machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from softprompt_api.errors import SoftpromptError

from softprompt.adapter_files import LocalAdapter, find_adapter
from softprompt.cli.options import make_options
from softprompt.cli.problems import WrongUsage
from softprompt.cli.services import refuse_variables_of_services
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="SOFTPROMPT_MODEL",
            help="Hugging Face folder, .gguf file or hub id; SmolLM2-135M-Instruct when not given",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="SOFTPROMPT_CONFIG", help="YAML file; its keys are these flags")
    ] = None,
    prompt_adapters: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SOFTPROMPT_PROMPT_ADAPTERS",
            metavar="NAME=PATH ...",
            help="adapters to register; PATH is a PEFT folder or a hub id",
        ),
    ] = None,
    enable_prompt_adapter: Annotated[
        bool | None,
        typer.Option(
            "--enable-prompt-adapter",
            envvar="SOFTPROMPT_ENABLE_PROMPT_ADAPTER",
            help="accepted for vLLM's sake: soft prompts are always served",
        ),
    ] = None,
    max_prompt_adapter_token: Annotated[
        int | None,
        typer.Option(envvar="SOFTPROMPT_MAX_PROMPT_ADAPTER_TOKEN", help="most virtual tokens of an adapter"),
    ] = None,
    max_prompt_adapters: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_MAX_PROMPT_ADAPTERS", help="most soft prompts on the device")
    ] = None,
    enable_lora: Annotated[
        bool | None,
        typer.Option(
            "--enable-lora",
            envvar="SOFTPROMPT_ENABLE_LORA",
            help="accepted for vLLM's sake: LoRAs are always served",
        ),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SOFTPROMPT_LORA_MODULES",
            metavar="NAME=PATH ...",
            help="LoRAs to register, as --prompt-adapters",
        ),
    ] = None,
    max_loras: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_MAX_LORAS", help="most LoRAs on the device, and in one batch")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_MAX_LORA_RANK", help="highest rank of a LoRA")
    ] = None,
    allow_file_imports: Annotated[
        str | None,
        typer.Option(envvar="SOFTPROMPT_ALLOW_FILE_IMPORTS", help="POST /v1/adapters may import folders below it"),
    ] = None,
    allow_hub_imports: Annotated[
        bool | None,
        typer.Option(
            envvar="SOFTPROMPT_ALLOW_HUB_IMPORTS", help="POST /v1/adapters may import repositories of the hub"
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_SERVED_MODEL_NAME", help="what requests call the base model")
    ] = None,
    host: Annotated[str | None, typer.Option(envvar="SOFTPROMPT_HOST", help="interface of the HTTP API")] = None,
    port: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_PORT", help="port of the HTTP API; 0 takes a free one")
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_TLS_CERT", help="certificate as PEM: the HTTP API has HTTPS")
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_TLS_KEY", help="private key of --tls-cert, as PEM")
    ] = None,
    registry_port: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_REGISTRY_PORT", help="port of the registry's gRPC")
    ] = None,
    inference_port: Annotated[
        int | None,
        typer.Option(
            envvar="SOFTPROMPT_INFERENCE_PORT",
            help="port of the inference service's gRPC; replicas have those behind it",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            envvar="SOFTPROMPT_REPLICAS",
            help="inference services that share the work, the processors and the memory",
        ),
    ] = None,
    require_keys: Annotated[
        bool | None,
        typer.Option(envvar="SOFTPROMPT_REQUIRE_KEYS", help="ask for an API key before the first was made"),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(envvar="SOFTPROMPT_INSECURE", help="ask for no API key, also beyond this machine"),
    ] = None,
    allowed_origins: Annotated[
        str | None,
        typer.Option(
            envvar="SOFTPROMPT_ALLOWED_ORIGINS",
            metavar="ORIGIN,...",
            help="origins whose web pages are let in, as https://app.example; '*': all, with an API key",
        ),
    ] = None,
    unknown_fields: Annotated[
        str | None,
        typer.Option(
            envvar="SOFTPROMPT_UNKNOWN_FIELDS",
            metavar="error|warn",
            help="unknown fields of requests: refuse them (error), or leave them out and log their names (warn)",
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(envvar="SOFTPROMPT_DATA_DIR", help="keeps adapters and logs; ~/.local/share/softprompt"),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_REDIS_URL", help="use this Redis or Valkey, embed none")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            envvar="SOFTPROMPT_DEVICE", help="auto, cpu, cuda, cuda:N, or cuda:0,cuda:1 for replicas in turn"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_DTYPE", help="auto, float32, bfloat16 or float16")
    ] = None,
    kv_cache_gb: Annotated[
        float | None,
        typer.Option(envvar="SOFTPROMPT_KV_CACHE_GB", help="memory of a device for the KV cache, in GiB"),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            envvar="SOFTPROMPT_GPU_MEMORY_UTILIZATION",
            help="share of the GPU's memory for weights and KV cache together, above 0 and at most 1",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(envvar="SOFTPROMPT_MAX_MODEL_LEN", help="longest sequence, virtual tokens included"),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(envvar="SOFTPROMPT_MAX_NUM_SEQS", help="most sequences in one batch")
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            envvar="SOFTPROMPT_ENABLE_PREFIX_CACHING",
            help="compute shared beginnings and soft prompts only once; off for measuring",
        ),
    ] = None,
    share: Annotated[
        bool | None,
        typer.Option(
            envvar="SOFTPROMPT_SHARE",
            help="share KV of soft prompts between requests; off for measuring, while text is shared all the same",
        ),
    ] = None,
    native_kernels: Annotated[
        bool | None,
        typer.Option(
            envvar="SOFTPROMPT_NATIVE_KERNELS", help="on a CPU, compile kernels where a C compiler is installed"
        ),
    ] = None,
) -> None:
    """Start the store, the registry, the inference service and the gateway; Ctrl-C ends them all."""
    flags = dict(locals())
    del flags["config"]
    options = make_options(flags, config)
    refuse_variables_of_services(options)
    # A hub may have to be asked for them: until something was started, a signal ends this command as any other.
    adapters = {name: _find(name, path) for name, path in options.adapters.items()}
    stop = Stop()
    stop.listen()
    Supervisor(options, adapters, Console(), stop).run()


def _find(name: str, path: str) -> LocalAdapter:
    try:
        return find_adapter(path)
    except SoftpromptError as error:
        raise WrongUsage(f"adapter {name!r}: {error.message}") from error
