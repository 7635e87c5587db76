"""`softprompt adapter` `ps`, `preload`, `evict`: which adapters are in the inference service's memory."""

import typer
from rich.table import Table

from softprompt.cli.adapters import Adapter, AsJson, Inference, console, print_json
from softprompt.cli.connections import inference_client
from softprompt.inference import DEFAULT_ADDRESS


def ps(inference: Inference = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List what is in memory, most recently used first."""
    with inference_client(inference) as client:
        adapters, total = client.resident()
    if as_json:
        print_json([info.as_dict() for info in adapters])
        return
    if not adapters:
        typer.echo("no adapter is in memory; each comes with its first request")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("ADAPTER", "TIER", "SIZE", "IDLE", "HITS", "IN USE", "DIGEST"):
        table.add_column(column, no_wrap=True)
    for info in adapters:
        idle = "" if info.in_use else f"{info.idle_s:.0f} s"
        size = f"{info.size_bytes / 1024:,.1f} KiB"
        table.add_row(info.adapter, info.tier, size, idle, str(info.hits), str(info.in_use), info.digest[:19])
    console().print(table)
    if total > len(adapters):
        typer.echo(f"and {total - len(adapters):,} more")


def preload(adapter: Adapter, inference: Inference = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Bring an adapter in before its first request."""
    with inference_client(inference) as client:
        digest = client.preload(adapter)
    if as_json:
        print_json({"adapter": adapter, "digest": digest})
    else:
        typer.echo(f"{adapter} is on the device: {digest}")


def evict(adapter: Adapter, inference: Inference = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Let an adapter go from memory."""
    with inference_client(inference) as client:
        digest = client.evict(adapter)
    if as_json:
        print_json({"adapter": adapter, "digest": digest})
    else:
        typer.echo(f"{adapter} is not in memory any more: {digest}")
