"""What a system that has started shows: what it serves, where, and one command to try."""

import json
from collections.abc import Mapping
from pathlib import Path

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt.cli.options import RunOptions
from softprompt.cli.services import Addresses
from softprompt.inference import InferenceClient
from softprompt.registry import AdapterInfo, RegistryClient

_MAX_ADAPTERS = 12
# The demo adapter is looked for among so many.
_MAX_ASKED = 100
_MIB = 2**20
_QUICK_TIMEOUT_S = 5.0
_DEMO = "tweet_adapter"
_DEMO_PROMPT = (
    "Tweet text : @nationalgridus I have no water and the bill is current and paid. "
    "Can you do something about this? Label :"
)


def show(console: Console, options: RunOptions, addresses: Addresses, logs: Path) -> None:
    """Print the start panel, with facts asked from the running services."""
    with InferenceClient(addresses.inference[0]) as inference:
        model = inference.model()
    with RegistryClient(addresses.registry) as registry:
        adapters, total = registry.first_adapters(_MAX_ASKED)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _facts(options, addresses, logs, model, adapter_list(adapters, total)):
        facts.add_row(name, Text(value))
    console.print(Panel(facts, title="Softprompt is serving", title_align="left", expand=False))
    # Outside the frame, so that it can be copied.
    console.print(
        curl(addresses, model, adapters, needs_key=_needs_key(addresses, model)),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print("Ctrl-C stops everything.", style="dim")


def _needs_key(addresses: Addresses, model: pb.GetModelResponse) -> bool:
    """Whether the gateway asks for an API key."""
    url = f"{addresses.gateway_url}/v1/models/{model.base_model.id}"
    try:
        # Its certificate is for names that clients use, and nothing is told here.
        answer = httpx.get(url, timeout=_QUICK_TIMEOUT_S, trust_env=False, verify=False)
    except httpx.HTTPError:
        return False  # the command is shown all the same
    return answer.status_code == httpx.codes.UNAUTHORIZED


def curl(addresses: Addresses, model: pb.GetModelResponse, adapters: list[AdapterInfo], *, needs_key: bool) -> str:
    """One request to paste: the demo adapter's, else the first adapter's, else the base model's."""
    names = [f"{info.name}:0" if info.num_tasks > 1 else info.name for info in adapters] or [model.base_model.id]
    name = _DEMO if _DEMO in names else names[0]
    body = {
        "model": name,
        "prompt": _DEMO_PROMPT if name == _DEMO else "The capital of France is",
        "max_tokens": 16,
        "temperature": 0,
    }
    key = ' -H "Authorization: Bearer $SOFTPROMPT_API_KEY"' if needs_key else ""
    return (
        f'curl {addresses.gateway_url}/v1/completions -H "Content-Type: application/json"{key} \\\n'
        f"  -d {_quoted(body)}"
    )


def _quoted(body: Mapping[str, object]) -> str:
    return "'" + json.dumps(body).replace("'", "'\\''") + "'"


def _facts(
    options: RunOptions, addresses: Addresses, logs: Path, model: pb.GetModelResponse, adapters: str
) -> list[tuple[str, str]]:
    base, memory = model.base_model, model.memory
    each = f"each of {options.replicas} replicas: " if options.replicas > 1 else ""
    return [
        ("model", f"{base.id} ({base.architecture}, {base.num_layers} layers, hidden size {base.hidden_size})"),
        ("device", f"{model.device}, {base.dtype}"),
        (
            "memory",
            f"{each}weights {memory.weights_bytes / _MIB:,.0f} MiB, KV cache "
            f"{memory.kv_cache_bytes / _MIB:,.0f} MiB = {memory.num_pages} pages of {memory.page_size} positions",
        ),
        ("context", f"{model.max_model_len} positions, at most {model.max_virtual_tokens} of them virtual tokens"),
        ("adapters", adapters),
        ("OpenAI API", f"{addresses.gateway_url}/v1   (documentation: {addresses.gateway_url}/docs)"),
        ("gRPC", f"registry {addresses.registry}, inference {', '.join(addresses.inference)}"),
        ("store", addresses.redis_url if options.redis_url is None else "as given by --redis-url"),
        ("logs", str(logs)),
    ]


def adapter_list(adapters: list[AdapterInfo], total: int) -> str:
    """The first adapters by name, and how many more there are."""
    if not adapters:
        return "none yet: softprompt adapter add NAME PATH"
    shown = [f"{info.name}@{info.version}" for info in adapters[:_MAX_ADAPTERS]]
    more = total - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
