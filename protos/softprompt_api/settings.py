"""How every service reads its settings: mistakes stop the start with one plain sentence."""

import os
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")

S = TypeVar("S", bound=BaseSettings)


class SettingsError(Exception):
    """A setting is unknown or has a value that cannot be; the message is for the person at the terminal."""


def refuse_unknown_variables(settings: type[BaseSettings]) -> None:
    """Raise SettingsError for a variable with the settings' own prefix that none of them is read from."""
    prefix = settings.model_config["env_prefix"]
    known = {f"{prefix}{name.upper()}" for name in settings.model_fields}
    if unknown := sorted(name for name in os.environ if name.startswith(prefix) and name not in known):
        raise SettingsError(f"unknown setting {unknown[0]}; known are {', '.join(sorted(known))}")


def read(settings: type[S], arguments: Sequence[str] | None = None, *, program: str = "") -> S:
    """Read flags (None: the program takes none), which win over the environment; SettingsError for a bad value."""
    flags = None
    if arguments is not None:
        flags = CliSettingsSource[object](
            settings,
            cli_prog_name=program,
            cli_parse_args=list(arguments),
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
        )
    try:
        return settings(_cli_settings_source=flags)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"{name}: {first['msg']}" if name else str(first["msg"])) from None


def is_loopback(host: str) -> bool:
    """Whether an interface is reached from this machine alone."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_reach(address: str, *, allow_remote: bool, setting: str, permission: str) -> None:
    """Raise ValueError, naming the two settings, for an address beyond loopback that is not explicitly allowed."""
    if not allow_remote and not address.startswith(_LOOPBACK):
        raise ValueError(
            f"{setting} {address} is reachable from other machines, without encryption; use 127.0.0.1, or set "
            f"{permission} where the network is private"
        )
