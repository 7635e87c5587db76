"""`softprompt adapter` `add`, `ls`, `show`, `rm`: the adapters of a running system."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from softprompt_api.errors import SoftpromptError

from softprompt.cli.connections import inference_client, registry_client
from softprompt.cli.problems import WrongUsage
from softprompt.inference import DEFAULT_ADDRESS as INFERENCE_ADDRESS
from softprompt.registry import DEFAULT_ADDRESS, AdapterInfo

_MAX_LINE = 1000
# Numbers that are 0 where a kind of adapter has none.
_OF_SOME_KINDS = ("num_virtual_tokens", "num_tasks", "rank")

app = typer.Typer(
    help="Add, list, show, change and remove adapters of a running system.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Registry = Annotated[
    str,
    typer.Option("--registry", envvar="SOFTPROMPT_REGISTRY_ADDRESS", help="host:port of the registry's gRPC"),
]
Inference = Annotated[
    str,
    typer.Option(
        "--inference",
        envvar="SOFTPROMPT_INFERENCE_ADDRESS",
        help="host:port of the inference service's gRPC; of several replicas, joined by commas",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Adapter = Annotated[str, typer.Argument(help="[TENANT/]NAME, NAME@VERSION, NAME@ALIAS or sha256:DIGEST")]


@app.command(
    help="Register a PEFT folder or a hub id under NAME; requests can use it at once. Its effect is measured then."
)
def add(
    name: Annotated[
        str, typer.Argument(help="what requests call it, behind TENANT/ where it is not the default tenant's")
    ],
    path: Annotated[
        str,
        typer.Argument(
            help="folder with adapter_config.json and adapter_model.safetensors, or hf://OWNER/NAME[@REVISION]"
        ),
    ],
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="free text to keep with it")] = None,
    base_model: Annotated[
        str, typer.Option(metavar="ID", help="id of the base model that it is for; empty: the one that is served")
    ] = "",
    probe: Annotated[
        bool, typer.Option(help="measure its effect on a few fixed prompts, where an inference service answers")
    ] = True,
    registry: Registry = DEFAULT_ADDRESS,
    inference: Inference = INFERENCE_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Upload one adapter; an existing name gets a new version."""
    labels = dict(parse_label(text) for text in label or ())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    errors = Console(stderr=True)
    with (
        registry_client(registry) as client,
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
    ):
        task = bar.add_task(f"uploading {name}")
        info, warnings = client.add(
            name,
            path,
            labels=labels,
            base_model=base_model,
            progress=lambda sent, total: bar.update(task, completed=sent, total=total),
        )
    if not as_json:
        typer.echo(f"{info.name}@{info.version} is ready: {info.size}, {info.digest}")
        if info.num_tasks > 1:
            typer.echo(f"each of its tasks is a model: {info.name}:0 to {info.name}:{info.num_tasks - 1}")
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    if probe:
        info = _probe(inference, info)
    if as_json:
        print_json(info.as_dict())


def _probe(inference: str, info: AdapterInfo) -> AdapterInfo:
    """The version with its effect, told where it has none; without where nobody can measure it."""
    try:
        with inference_client(inference) as client:
            probed = client.probe(f"{info.name}@{info.version}")
    except SoftpromptError as error:
        typer.echo(f"its effect was not measured: {error.message}", err=True)
        return info
    for warning in probed.probe.warnings if probed.probe else ():
        typer.echo(f"warning: {warning}", err=True)
    return probed


@app.command(help="List the adapters of all tenants, the latest version of each.")
def ls(
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="only those whose latest version has it")
    ] = None,
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """List every name, or those with some labels."""
    labels = dict(parse_label(text) for text in label or ())
    with registry_client(registry) as client:
        adapters = client.adapters(all_tenants=True, labels=labels)
    if as_json:
        print_json([info.as_dict() for info in adapters])
    elif not adapters and labels:
        typer.echo("no adapters with these labels")
    elif not adapters:
        typer.echo("no adapters; add one with: softprompt adapter add NAME PATH")
    else:
        console().print(_table(adapters))


@app.command(help="Show one adapter, and with a bare name all its versions.")
def show(adapter: Adapter, registry: Registry = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show everything the registry knows."""
    with registry_client(registry) as client:
        info = client.get(adapter)
        versions = client.versions(info.name) if adapter == info.name else [info]
    if as_json:
        print_json({**info.as_dict(), "versions": [version.version for version in versions]})
        return
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(info).items():
        facts.add_row(name.replace("_", " "), json.dumps(value) if isinstance(value, dict | list) else str(value))
    console().print(facts, highlight=False, markup=False)
    if len(versions) > 1:
        console().print(_table(versions))


def _facts(info: AdapterInfo) -> dict[str, Any]:
    """What there is to tell of a version; numbers that belong together as a sentence."""
    effects = [
        ("" if effect.task is None else f"task {effect.task}: ") + str(effect)
        for effect in (info.probe.effects if info.probe else ())
    ]
    told = {name: value for name, value in info.as_dict().items() if value or name not in _OF_SOME_KINDS}
    return {
        **told,
        "row_norms": info.row_norms or "not known",
        "vocabulary_norms": info.vocabulary_norms or "not known",
        "probe": "; ".join(effects) or "not measured yet; see softprompt adapter probe",
        "warnings": "; ".join(info.warnings) or "none",
    }


@app.command(
    help="Delete an adapter with all its versions, or NAME@VERSION alone, unless it is pinned or has an alias. "
    "Running requests finish with it."
)
def rm(
    adapter: Annotated[str, typer.Argument(help="[TENANT/]NAME or [TENANT/]NAME@VERSION")],
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Delete a name or one version."""
    with registry_client(registry) as client:
        deleted = client.remove(adapter)
    if as_json:
        print_json({"adapter": adapter, "deleted_versions": deleted})
    else:
        typer.echo(f"deleted {adapter} ({deleted} {'version' if deleted == 1 else 'versions'})")


def parse_label(text: str) -> tuple[str, str]:
    """Key and value of KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise WrongUsage(f"label: {text!r} is not KEY=VALUE")
    return key, value


def _table(adapters: list[AdapterInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    columns = (
        "NAME",
        "VERSION",
        "ALIASES",
        "KIND",
        "VIRTUAL TOKENS",
        "DTYPE",
        "SIZE",
        "DIGEST",
        "CREATED",
        "LABELS",
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    for info in adapters:
        version = f"{info.version} pinned" if info.pinned else str(info.version)
        size = f"{info.size_bytes / 1024:,.1f} KiB"
        labels = Text(" ".join(f"{key}={value}" for key, value in sorted(info.labels.items())))
        table.add_row(
            *(
                info.name,
                version,
                " ".join(info.aliases),
                info.kind,
                str(info.num_virtual_tokens),
                info.dtype,
                size,
            ),
            *(info.digest[:19], info.created_at, labels),
        )
    return table


def console() -> Console:
    """Standard output; what is not a terminal gets whole lines."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_MAX_LINE)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    typer.echo(json.dumps(value, indent=2))
