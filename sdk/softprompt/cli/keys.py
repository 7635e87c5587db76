"""`softprompt key` `create`, `ls`, `revoke`: the API keys of a running system."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table
from softprompt_api.access import Scope
from softprompt_api.tenants import DEFAULT_TENANT

from softprompt.cli.adapters import AsJson, Registry, console, print_json
from softprompt.cli.connections import key_client
from softprompt.cli.problems import WrongUsage
from softprompt.keys import KeyInfo
from softprompt.registry import DEFAULT_ADDRESS

app = typer.Typer(
    help="Make, list and revoke the API keys that the gateway asks for.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Limit = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="0: no limit")]


@app.command(help="Make an API key and print it: it cannot be shown again.")
def create(
    scopes: Annotated[str, typer.Option("--scopes", help=f"joined by commas: {', '.join(Scope)}")] = Scope.INFER,
    tenant: Annotated[str, typer.Option("--tenant", help="whose key it is")] = DEFAULT_TENANT,
    name: Annotated[str, typer.Option("--name", help="what people call it")] = "",
    adapters: Annotated[
        str, typer.Option("--adapters", help="names joined by commas that it may use; all when not given")
    ] = "",
    expires_in_days: Annotated[
        float | None, typer.Option("--expires-in-days", help="when it ends; never when not given")
    ] = None,
    requests_per_minute: Limit = 0,
    tokens_per_minute: Limit = 0,
    parallel_requests: Limit = 0,
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Make one key."""
    asked_for, expires_at = _scopes(scopes), _expiry(expires_in_days)
    with key_client(registry) as client:
        is_first = not client.was_any_made()
        key, info = client.create(
            asked_for,
            tenant=tenant,
            name=name,
            adapters=[adapter for adapter in adapters.split(",") if adapter],
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            parallel_requests=parallel_requests,
            expires_at=expires_at,
        )
    if as_json:
        print_json({**info.as_dict(), "key": key})
    else:
        typer.echo(f"{info.id} of {info.tenant}: keep it, it is not shown again", err=True)
        if is_first:
            typer.echo("from now on every request needs a key, also after this one is revoked", err=True)
        typer.echo(key)


@app.command(help="List the API keys.")
def ls(registry: Registry = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List every key that is not revoked."""
    with key_client(registry) as client:
        keys = client.keys()
    if as_json:
        print_json([info.as_dict() for info in keys])
    elif not keys:
        typer.echo("no API keys; make one with: softprompt key create --scopes admin")
    else:
        console().print(_table(keys), markup=False, highlight=False)


@app.command(help="Revoke an API key: gateways refuse it at once, requests that run finish.")
def revoke(
    key: Annotated[str, typer.Argument(help="the key's id, key-…")],
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Delete one key."""
    with key_client(registry) as client:
        client.revoke(key)
    if as_json:
        print_json({"key": key, "revoked": True})
    else:
        typer.echo(f"revoked {key}")


def _scopes(text: str) -> list[Scope]:
    try:
        return [Scope(scope.strip()) for scope in text.split(",")]
    except ValueError:
        raise WrongUsage(f"--scopes: {text!r} is not a list of {', '.join(Scope)}") from None


def _expiry(days: float | None) -> datetime | None:
    if days is None:
        return None
    try:
        return datetime.now(UTC) + timedelta(days=days)
    except (OverflowError, ValueError):
        raise WrongUsage(f"--expires-in-days: {days:g} days are no time that a key can end at") from None


def _table(keys: list[KeyInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("ID", "TENANT", "SCOPES", "ADAPTERS", "LIMITS", "EXPIRES", "CREATED", "NAME"):
        table.add_column(column, no_wrap=True)
    for info in keys:
        scopes, adapters = ",".join(info.scopes), ",".join(info.adapters) or "all"
        table.add_row(
            *(info.id, info.tenant, scopes, adapters, _limits(info)),
            *(info.expires_at or "never", info.created_at, info.name),
        )
    return table


def _limits(info: KeyInfo) -> str:
    limits = (
        (info.requests_per_minute, "requests/min"),
        (info.tokens_per_minute, "tokens/min"),
        (info.parallel_requests, "parallel"),
    )
    return ", ".join(f"{most} {unit}" for most, unit in limits if most) or "none"
