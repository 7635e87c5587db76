"""`softprompt adapter add-all`: a folder of PEFT folders, each registered under its own name."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from softprompt_api.errors import AdapterConflict, DataCorrupted, InvalidArgument
from softprompt_api.formats import CONFIG_FILE
from softprompt_api.tenants import DEFAULT_TENANT, full_name

from softprompt.cli.adapters import AsJson, Registry, print_json
from softprompt.cli.connections import registry_client
from softprompt.cli.problems import Problem
from softprompt.registry import DEFAULT_ADDRESS


def add_all(
    folder: Annotated[Path, typer.Argument(help="its subfolders are what PEFT's save_pretrained wrote")],
    tenant: Annotated[str, typer.Option(help="whose adapters they are")] = DEFAULT_TENANT,
    base_model: Annotated[
        str, typer.Option(metavar="ID", help="id of the base model they are for; empty: the one that is served")
    ] = "",
    registry: Registry = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Register each content that its name does not have. What is refused does not keep the others from it."""
    paths = _peft_folders(folder)
    times_taken = Counter(map(_name, paths))
    told: list[dict[str, object]] = []
    with registry_client(registry) as client:
        for path in paths:
            name = full_name(tenant, _name(path))
            try:
                if times_taken[_name(path)] > 1:
                    raise InvalidArgument(f"another folder would be {name} too", field="name")
                info, is_new = client.ensure(name, path, base_model=base_model)
            except (InvalidArgument, AdapterConflict, DataCorrupted) as error:
                told.append({"folder": path.name, "state": "refused", "error": error.message})
                typer.echo(f"{path.name} is refused: {error.message}", err=True)
                continue
            told.append({"folder": path.name, "state": "added" if is_new else "unchanged", **info.as_dict()})
            if not as_json:
                typer.echo(f"{info.name}@{info.version} {'is ready' if is_new else 'has it already'}: {info.size}")
            for warning in info.warnings if is_new else ():
                typer.echo(f"warning: {info.name}: {warning}", err=True)
    if as_json:
        print_json(told)
    counts = Counter(str(one["state"]) for one in told)
    summary = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    if counts["refused"]:
        raise Problem(summary)
    typer.echo(summary, err=True)


def _peft_folders(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.expanduser().iterdir(), key=_name)
        paths = [path for path in inside if (path / CONFIG_FILE).is_file()]
    except (OSError, RuntimeError) as error:
        raise Problem(f"cannot read the folder {folder}: {getattr(error, 'strerror', None) or error}") from None
    if not paths:
        raise Problem(f"no folder in {folder} has {CONFIG_FILE}; `softprompt adapter add` takes one PEFT folder")
    return paths


def _name(path: Path) -> str:
    """Names have small letters, and folders what they were called on the hub."""
    return path.name.lower()
