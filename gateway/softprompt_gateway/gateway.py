"""The parts of one gateway, made once and handed to its routes."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from softprompt_gateway.adapters.probing import Probing
from softprompt_gateway.body import read_json
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import Clients
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.resolve import Resolver
from softprompt_gateway.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What routes work with."""

    settings: Settings
    clients: Clients
    catalog: Catalog
    resolver: Resolver
    probing: Probing
    metrics: Metrics

    async def json(self, request: Request) -> dict[str, Any]:
        """The request's JSON body, within the settings' limits."""
        return await read_json(
            request, limit_bytes=self.settings.max_body_bytes, timeout_s=self.settings.body_timeout_s
        )


def make_gateway(settings: Settings, clients: Clients) -> Gateway:
    """Build the parts over connected clients."""
    catalog = Catalog()
    return Gateway(
        settings=settings,
        clients=clients,
        catalog=catalog,
        resolver=Resolver(clients.registry, clients.inference, catalog),
        probing=Probing(clients.inference, catalog),
        metrics=Metrics(),
    )
