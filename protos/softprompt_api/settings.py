"""How every service reads its settings: mistakes stop the start with one plain sentence."""

import os
import re
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Self, TypeVar

from pydantic import AliasChoices, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from softprompt_api.rpc.tls import ClientTls, ServerTls

S = TypeVar("S", bound=BaseSettings)

_SERVICE_VARIABLE = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)\Z|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?\Z", re.ASCII
)
_SERVICE_PROTOCOLS = ("tcp://", "udp://", "sctp://")


class SettingsError(Exception):
    """A setting is unknown or has a value that cannot be; the message is for the person at the terminal."""


class ClientTlsSettings(BaseSettings):
    """What every service that calls others is told about TLS: the flag `--tls-ca`, or `SOFTPROMPT_TLS_CA` …"""

    model_config = SettingsConfigDict(env_prefix="SOFTPROMPT_", populate_by_name=True)

    tls_ca: Path | None = Field(
        None,
        validation_alias=AliasChoices("tls-ca", "SOFTPROMPT_TLS_CA"),
        description="authorities whose certificates the other services have, as PEM; without it they have no TLS",
    )
    tls_client_cert: Path | None = Field(
        None,
        validation_alias=AliasChoices("tls-client-cert", "SOFTPROMPT_TLS_CLIENT_CERT"),
        description="certificate to show them, as PEM",
    )
    tls_client_key: Path | None = Field(
        None,
        validation_alias=AliasChoices("tls-client-key", "SOFTPROMPT_TLS_CLIENT_KEY"),
        description="its private key, as PEM",
    )

    @model_validator(mode="after")
    def _check_client_tls(self) -> Self:
        _ = self.client_tls
        return self

    @property
    def client_tls(self) -> ClientTls | None:
        """How the other services are called; None: without TLS."""
        return ClientTls.of(self.tls_ca, self.tls_client_cert, self.tls_client_key)


def refuse_unknown_variables(settings: type[BaseSettings]) -> None:
    """Raise SettingsError for a variable with the settings' own prefix that none of them is read from.

    What Kubernetes tells every pod of a Service that is called like the prefix is left alone.
    """
    prefix = settings.model_config["env_prefix"]
    known = {f"{prefix}{name.upper()}" for name in settings.model_fields}
    own = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
    of_services = {name for name, value in own.items() if _is_of_a_service(name, value)}
    if mistaken := sorted(of_services & known):
        raise SettingsError(
            f"{mistaken[0]} is {own[mistaken[0]]}, which Kubernetes tells of a Service of this name; call the "
            "Service otherwise, or set enableServiceLinks: false for the pod"
        )
    if unknown := sorted(own.keys() - known - of_services):
        raise SettingsError(f"unknown setting {unknown[0]}; known are {', '.join(sorted(known))}")


def _is_of_a_service(name: str, value: str) -> bool:
    is_link = name.endswith("_PORT") and value.startswith(_SERVICE_PROTOCOLS)
    return is_link or _SERVICE_VARIABLE.search(name) is not None


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
        message = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{name}: {message}" if name else message) from None


def is_loopback(host: str) -> bool:
    """Whether an interface is reached from this machine alone."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_reach(
    address: str, *, allow_remote: bool, setting: str, permission: str, tls: ServerTls | None = None
) -> None:
    """Raise ValueError, naming the settings, for an address beyond loopback where strangers could call.

    Others than this machine may, where it is explicitly allowed or they must have a certificate.
    """
    asks_who_calls = tls is not None and tls.client_ca is not None
    is_local = address.startswith("unix:") or is_loopback(address.rpartition(":")[0])
    if not (allow_remote or asks_who_calls or is_local):
        flaw = "without encryption" if tls is None else "and asks nobody for a certificate"
        prefix = setting.removesuffix("address")
        raise ValueError(
            f"{setting} {address} is reachable from other machines, {flaw}; use 127.0.0.1, or TLS with "
            f"{prefix}tls_client_ca, or set {permission} where the network is private"
        )
