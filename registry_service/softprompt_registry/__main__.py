"""`python -m softprompt_registry`: serve until SIGTERM or SIGINT, then drain."""

import gc

# What is imported lives as long as the process: the collector would go through it over and over.
if __name__ == "__main__":
    gc.disable()

import asyncio
import sys

from softprompt_api.ending import run_to_end
from softprompt_api.garbage import start_collecting
from softprompt_api.logs import configure_logs
from softprompt_api.rpc.server import wait_for_stop_signal
from softprompt_api.tracing import open_tracer

from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings, SettingsError, read_settings
from softprompt_registry.startup import StoreUnfit


async def serve(settings: Settings) -> None:
    """Run a registry until a signal stops it, also while it still waits for its store."""
    tracer = open_tracer("softprompt-registry")
    server = RegistryServer(settings, tracer)
    stopping = asyncio.create_task(wait_for_stop_signal())
    starting = asyncio.create_task(server.start())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            start_collecting()
            await stopping
    finally:
        starting.cancel()
        await server.stop()
        if tracer is not None:
            tracer.close()


def main() -> None:
    """Start with what flags and environment say; exit 1 with one plain sentence when that cannot be."""
    try:
        settings = read_settings(sys.argv[1:])
        configure_logs(settings.log_format)
        asyncio.run(serve(settings))
    except (SettingsError, StoreUnfit, OSError) as error:
        sys.exit(f"softprompt registry: {error}")


if __name__ == "__main__":
    run_to_end(main)
