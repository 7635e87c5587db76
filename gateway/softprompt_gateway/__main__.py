"""`python -m softprompt_gateway`: serve HTTP until SIGTERM or SIGINT."""

import gc

# What is imported lives as long as the process: the collector would go through it over and over.
if __name__ == "__main__":
    gc.disable()

import asyncio
import socket
import sys

from softprompt_api.ending import run_to_end
from softprompt_api.garbage import start_collecting
from softprompt_api.logs import configure_logs
from softprompt_api.open_files import allow_many
from softprompt_api.tracing import open_tracer

from softprompt_gateway.admission import Admission
from softprompt_gateway.app import make_app
from softprompt_gateway.clients import open_clients
from softprompt_gateway.guard import refuse_without_keys
from softprompt_gateway.server import GracefulServer, listen, uvicorn_config
from softprompt_gateway.settings import ENV_PREFIX, Settings, SettingsError, read_settings


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Serve on a bound socket until stopped."""
    tracer = open_tracer("softprompt-gateway")
    clients = open_clients(settings)
    try:
        await refuse_without_keys(settings, clients.registry)
        admission = Admission(settings.max_requests)
        config = uvicorn_config(make_app(settings, clients, admission, tracer), settings)
        server = GracefulServer(config, admission, grace_s=settings.grace_s)
        start_collecting()
        await server.serve(sockets=[listener])
    finally:
        await clients.close()
        if tracer is not None:
            tracer.close()


def main() -> int:
    """Run the gateway; return the process's exit status."""
    if sys.argv[1:]:
        return _fail(SettingsError(f"no arguments are taken, not {sys.argv[1]!r}: set {ENV_PREFIX}… instead"))
    try:
        settings = read_settings()
        listener = listen(settings.host, settings.port)
    except (SettingsError, OSError) as error:
        return _fail(error)
    allow_many()  # each client is a connection
    configure_logs(settings.log_format)
    try:
        asyncio.run(serve(settings, listener))
    except SettingsError as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    print(f"softprompt gateway: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_to_end(main)
