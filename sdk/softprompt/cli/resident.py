"""`softprompt adapter` `ps`, `preload`, `evict`: which adapters are in the memory of the inference services."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from softprompt_api.errors import AdapterNotFound

from softprompt.cli.adapters import Adapter, AsJson, Inference, console, print_json
from softprompt.cli.connections import inference_client
from softprompt.inference import DEFAULT_ADDRESS, ResidentInfo, replicas_of

Pin = Annotated[bool, typer.Option("--pin", help="keep it there until it is evicted, or the engine ends")]


def ps(inference: Inference = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List what is in memory, most recently used first."""
    adapters: list[tuple[str, ResidentInfo]] = []
    total = 0
    for replica in replicas_of(inference):
        with inference_client(replica) as client:
            listed, count = client.resident()
        adapters += [(replica, info) for info in listed]
        total += count
    if as_json:
        print_json([{"replica": replica, **info.as_dict()} for replica, info in adapters])
        return
    if not adapters:
        typer.echo("no adapter is in memory; each comes with its first request")
        return
    console().print(_table(adapters))
    if total > len(adapters):
        typer.echo(f"and {total - len(adapters):,} more")


def _table(adapters: Sequence[tuple[str, ResidentInfo]]) -> Table:
    """A row for each adapter, with its replica where there are several."""
    are_several = len({replica for replica, _ in adapters}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    columns = ["ADAPTER", "TIER", "SIZE", "IDLE", "HITS", "IN USE", "PINNED", "DIGEST"]
    for column in [*columns, "REPLICA"] if are_several else columns:
        table.add_column(column, no_wrap=True)
    for replica, info in adapters:
        idle = "" if info.in_use else f"{info.idle_s:.0f} s"
        size = f"{info.size_bytes / 1024:,.1f} KiB"
        pinned = "yes" if info.pinned else ""
        row = [info.adapter, info.tier, size, idle, str(info.hits), str(info.in_use), pinned, info.digest[:19]]
        table.add_row(*row, *([replica] if are_several else []))
    return table


def preload(
    adapter: Adapter, inference: Inference = DEFAULT_ADDRESS, pin: Pin = False, as_json: AsJson = False
) -> None:
    """Bring an adapter in before its first request, to each replica that is named."""
    for replica in replicas_of(inference):
        with inference_client(replica) as client:
            digest = client.preload(adapter, pin=pin)
    if as_json:
        print_json({"adapter": adapter, "digest": digest})
    else:
        typer.echo(f"{adapter} is on the device{', pinned' if pin else ''}: {digest}")


def evict(adapter: Adapter, inference: Inference = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Let an adapter go from the memory of each replica that has it."""
    digest = ""
    for replica in (places := replicas_of(inference)):
        with inference_client(replica) as client:
            try:
                digest = client.evict(adapter)
            except AdapterNotFound:
                if replica == places[-1] and not digest:
                    raise
    if as_json:
        print_json({"adapter": adapter, "digest": digest})
    else:
        typer.echo(f"{adapter} is not in memory any more: {digest}")
