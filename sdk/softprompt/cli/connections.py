"""What stands before a command: `--version`, and `--tls-ca`, with which the clients of all commands are made."""

from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from softprompt_api.rpc.tls import ClientTls

from softprompt.cli.problems import WrongUsage
from softprompt.gateway import GatewayClient
from softprompt.inference import InferenceClient
from softprompt.keys import KeyClient
from softprompt.registry import RegistryClient

_tls: ContextVar[ClientTls | None] = ContextVar("tls", default=None)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"softprompt {version('softprompt')}")
        raise typer.Exit


def begin(
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca", envvar="SOFTPROMPT_TLS_CA", help="call services with TLS: their authorities, as PEM"
        ),
    ] = None,
    tls_client_cert: Annotated[
        Path | None,
        typer.Option("--tls-client-cert", envvar="SOFTPROMPT_TLS_CLIENT_CERT", help="certificate to show them"),
    ] = None,
    tls_client_key: Annotated[
        Path | None,
        typer.Option("--tls-client-key", envvar="SOFTPROMPT_TLS_CLIENT_KEY", help="its private key"),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="tell the version and end")
    ] = False,
) -> None:
    """Keep how services are called, for the command that follows."""
    try:
        _tls.set(ClientTls.of(tls_ca, tls_client_cert, tls_client_key))
    except ValueError as error:
        raise WrongUsage(str(error)) from None


def client_tls() -> ClientTls | None:
    """How services are called; None: without TLS."""
    return _tls.get()


def registry_client(address: str) -> RegistryClient:
    """A connection to the registry at `host:port`."""
    return RegistryClient(address, tls=client_tls())


def key_client(address: str) -> KeyClient:
    """A connection to the API keys of the registry at `host:port`."""
    return KeyClient(address, tls=client_tls())


def inference_client(address: str) -> InferenceClient:
    """A connection to the inference service at `host:port`."""
    return InferenceClient(address, tls=client_tls())


def gateway_client(url: str, api_key: str | None) -> GatewayClient:
    """A connection to the gateway at a URL."""
    return GatewayClient(url, api_key=api_key, tls=client_tls())
