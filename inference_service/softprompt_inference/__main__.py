"""`python -m softprompt_inference`: serve until SIGTERM or SIGINT, then drain."""

import gc

# What is imported lives as long as the process: the collector would go through it over and over.
if __name__ == "__main__":
    gc.disable()

import asyncio
import sys

from softprompt_api.ending import run_to_end
from softprompt_api.errors import SoftpromptError
from softprompt_api.garbage import start_collecting
from softprompt_api.logs import configure_logs
from softprompt_api.open_files import allow_many
from softprompt_api.rpc.server import wait_for_stop_signal
from softprompt_api.tracing import open_tracer

from softprompt_inference.engine.client import EngineStartError
from softprompt_inference.model.errors import ModelSourceError
from softprompt_inference.server import EngineDied, InferenceServer
from softprompt_inference.settings import Settings, SettingsError, read_settings


async def serve(settings: Settings) -> None:
    """Run the service until a signal stops it, also while it starts; EngineDied when its engines do not last."""
    tracer = open_tracer("softprompt-inference")
    server = InferenceServer(settings, tracer)
    stopping = asyncio.create_task(wait_for_stop_signal())
    running = asyncio.create_task(_run(server))
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)
        await server.stop()
        if tracer is not None:
            tracer.close()


async def _run(server: InferenceServer) -> None:
    await server.start()
    start_collecting()
    await server.keep_serving()


def main() -> None:
    """Start with what flags and environment say; exit 1 with one plain sentence when that cannot be."""
    try:
        settings = read_settings(sys.argv[1:])
        configure_logs(settings.log_format)
        allow_many()
        asyncio.run(serve(settings))
    except (SettingsError, ModelSourceError, EngineStartError, EngineDied, SoftpromptError, OSError) as error:
        sys.exit(f"softprompt inference: {error}")


if __name__ == "__main__":
    run_to_end(main)
