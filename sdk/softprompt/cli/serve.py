"""`softprompt serve`: one service, in this very process."""

import os
from enum import StrEnum
from typing import Annotated

import typer

from softprompt.cli.services import command


class Service(StrEnum):
    """The services."""

    REGISTRY = "registry"
    INFERENCE = "inference"
    GATEWAY = "gateway"


def serve(
    context: typer.Context,
    service: Annotated[Service, typer.Argument(help="which one")],
) -> None:
    """Become the service: signals and exit code are its own."""
    # What stands before the command is how services are called; they read it from their environment.
    for flag, value in context.find_root().params.items():
        if value is not None:
            os.environ[f"SOFTPROMPT_{flag.upper()}"] = str(value)
    line = command(service, context.args)
    os.execv(line[0], line)
