"""The registry as a running server: store, service, health that follows the store, graceful stop."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

import structlog
from redis.asyncio import Redis
from softprompt_api.errors import SoftpromptError
from softprompt_api.registry.v1 import registry_pb2, registry_pb2_grpc
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.tracing import Tracer

from softprompt_registry.connection import open_store, reply, store_errors
from softprompt_registry.key_servicer import KeyServicer
from softprompt_registry.registry import Registry
from softprompt_registry.servicer import RegistryServicer
from softprompt_registry.settings import Settings
from softprompt_registry.startup import check_store, shown_url, wait_for_store
from softprompt_registry.uploads import UploadLimits

_log = structlog.get_logger()
_MAX_CONNECTIONS = 128


class RegistryServer:
    """Serves on `port` between `start` and `stop`, or as an async context manager."""

    def __init__(self, settings: Settings, tracer: Tracer | None = None) -> None:
        self._settings = settings
        self._client = open_store(
            settings.redis_url, timeout_s=settings.store_timeout_s, max_connections=_MAX_CONNECTIONS
        )
        self._watch_client = open_store(
            settings.redis_url,
            timeout_s=settings.heartbeat_s + settings.store_timeout_s,
            max_connections=settings.max_watchers,
        )
        self._registry = Registry(
            self._client,
            self._watch_client,
            limits=UploadLimits(
                max_size_bytes=settings.max_upload_bytes,
                max_concurrent=settings.max_uploads,
                timeout_s=settings.upload_timeout_s,
            ),
            heartbeat_s=settings.heartbeat_s,
            lease_s=settings.lease_s,
            max_watchers=settings.max_watchers,
            import_root=settings.allow_file_imports,
            allow_hub_imports=settings.allow_hub_imports,
        )
        services = list(registry_pb2.DESCRIPTOR.services_by_name.values())
        self._server = ServiceServer(settings.address, services, settings.server_tls, tracer)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryServicer(self._registry, is_durable=settings.durability == "strong", tracer=tracer),
            self._server.server,
        )
        registry_pb2_grpc.add_KeyServiceServicer_to_server(KeyServicer(self._registry.keys), self._server.server)
        self._probing: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    async def start(self) -> None:
        """Serve.

        Raises:
            StoreUnfit: the store is away, or would lose what it acknowledges.
            OSError: the address is taken.
        """
        settings = self._settings
        await wait_for_store(self._client, settings.redis_url, timeout_s=settings.start_timeout_s)
        await check_store(self._client, durability=settings.durability)
        await self._server.start()
        self._probing = asyncio.create_task(self._follow_store())
        _log.info(
            "registry ready",
            address=settings.address,
            port=self.port,
            store=shown_url(settings.redis_url),
            durability=settings.durability,
        )

    async def stop(self) -> None:
        """End watches at once, let other calls end within the grace; also after a start that failed."""
        if self._probing:
            self._probing.cancel()
            self._registry.stopping.begin()
            await self._server.stop(self._settings.grace_s)
            with suppress(SoftpromptError):  # a store that is away keeps what it has
                await self._registry.leases.close()
            _log.info("registry stopped")
        await self._close_clients()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _close_clients(self) -> None:
        for client in (self._client, self._watch_client):
            await client.aclose()
            await client.connection_pool.disconnect()

    async def _follow_store(self) -> None:
        """Tell health checks whether the store answers."""
        is_serving = True
        while True:
            await asyncio.sleep(self._settings.probe_interval_s)
            answers = await _answers(self._client)
            if answers != is_serving:
                is_serving = answers
                _log.warning("the store is back" if answers else "the store is away; waiting for it")
                await self._server.set_serving(answers)


async def _answers(client: Redis) -> bool:
    try:
        async with store_errors():
            await reply(client.ping())
    except SoftpromptError:
        return False
    return True
