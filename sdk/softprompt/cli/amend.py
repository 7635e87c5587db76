"""`softprompt adapter` `alias`, `rollback`, `pin`, `unpin`, `label`: what can be changed of adapters."""

from typing import Annotated

import typer
from softprompt_api.errors import AdapterNotFound
from softprompt_api.names import MAX_VERSION

from softprompt.cli.adapters import AsJson, Registry, parse_label, print_json
from softprompt.cli.connections import registry_client
from softprompt.cli.problems import WrongUsage
from softprompt.registry import DEFAULT_ADDRESS, AdapterInfo, RegistryClient

Name = Annotated[str, typer.Argument(help="the adapter's NAME")]
Version = Annotated[str, typer.Argument(help="NAME, NAME@VERSION or NAME@ALIAS")]


def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="what stands after the @")],
    version: Annotated[
        int | None, typer.Argument(min=1, max=MAX_VERSION, help="the version it shall point to")
    ] = None,
    expect: Annotated[
        int | None,
        typer.Option(
            "--expect", min=0, max=MAX_VERSION, help="move it only from this version; 0: only make it new"
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="remove the alias")] = False,
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Make an alias point to a version, or remove it."""
    if remove == (version is not None):
        raise WrongUsage("give the VERSION that the alias shall point to, or --remove")
    with registry_client(registry) as client:
        if version is None:
            client.remove_alias(name, alias, expected=expect)
        else:
            client.set_alias(name, alias, version, expected=expect)
    spelling = f"{name}@{alias}"
    if as_json:
        print_json({"alias": spelling, "version": version})
    else:
        typer.echo(f"removed {spelling}" if version is None else f"{spelling} is {name}@{version} now")


def rollback(
    name: Name,
    to: Annotated[
        int | None,
        typer.Option(
            "--to", min=1, max=MAX_VERSION, help="the version to go back to; the one before, when not given"
        ),
    ] = None,
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Make a bare name mean an older version again."""
    with registry_client(registry) as client:
        latest = client.get(name)
        info = client.set_alias(name, "latest", to or _before(client, latest), expected=latest.version)
    if as_json:
        print_json(info.as_dict())
    else:
        typer.echo(f"{name} is {name}@{info.version} now, and was {name}@{latest.version}")


def _before(client: RegistryClient, latest: AdapterInfo) -> int:
    older = [info.version for info in client.versions(latest.name) if info.version < latest.version]
    if not older:
        raise AdapterNotFound(f"there is no version before {latest.name}@{latest.version}")
    return max(older)


def pin(adapter: Version, registry: Registry = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Keep a version from deletion."""
    _pin(adapter, True, registry, as_json)


def unpin(adapter: Version, registry: Registry = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Let a version be deleted again."""
    _pin(adapter, False, registry, as_json)


def _pin(adapter: str, pinned: bool, registry: str, as_json: bool) -> None:
    with registry_client(registry) as client:
        info = client.update(adapter, pinned=pinned)
    if as_json:
        print_json(info.as_dict())
    else:
        typer.echo(f"{info.name}@{info.version} is {'pinned' if pinned else 'not pinned any more'}")


def label(
    adapter: Version,
    label: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="labels to set")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", metavar="KEY", help="a label to remove")] = None,
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Set and remove labels of a version."""
    labels: dict[str, str | None] = {
        **dict.fromkeys(remove or ()),
        **dict(parse_label(text) for text in label or ()),
    }
    if not labels:
        raise WrongUsage("give labels to set as KEY=VALUE, or --remove KEY")
    with registry_client(registry) as client:
        info = client.update(adapter, labels=labels)
    if as_json:
        print_json(info.as_dict())
    else:
        shown = ", ".join(f"{key}={value}" for key, value in sorted(info.labels.items()))
        typer.echo(f"{info.name}@{info.version} has {shown or 'no labels'}")
