"""The parts of one gateway, made once and handed to its routes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from softprompt_api.access import Scope
from softprompt_api.names import shown
from starlette.requests import Request

from softprompt_gateway.adapters.probing import Probing
from softprompt_gateway.body import leave_out_unknown, read_json
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.clients import Clients
from softprompt_gateway.errors import Refused
from softprompt_gateway.guard import Guard, GuardedRoute, guarded
from softprompt_gateway.keyring import Keyring
from softprompt_gateway.lease import Lease
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.rates import Limiter
from softprompt_gateway.resolve import Resolver
from softprompt_gateway.settings import Settings
from softprompt_gateway.validation import RequestModel

# Fields that are not known, of one request: it may have as many as fit into its body.
_MAX_LOGGED = 16
_log = structlog.get_logger()

Body = TypeVar("Body", bound=RequestModel)
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What routes work with."""

    settings: Settings
    clients: Clients
    catalog: Catalog
    keyring: Keyring
    lease: Lease
    guard: Guard
    limiter: Limiter
    resolver: Resolver
    probing: Probing
    metrics: Metrics

    def route(self, wanted: Scope | None, kind: type[GuardedRoute] = GuardedRoute) -> type[GuardedRoute]:
        """The class of routes that need a scope; None: that are open to everybody."""
        return guarded(self.guard, self.limiter, wanted, kind)

    async def json(self, request: Request, read: Callable[[dict[str, Any]], Read]) -> Read:
        """What `read` makes of the request's JSON body, within the settings' limits."""
        return await read_json(
            request, read, limit_bytes=self.settings.max_body_bytes, timeout_s=self.settings.body_timeout_s
        )

    async def body(self, request: Request, model: type[Body]) -> Body:
        """The request's body, checked. Unknown fields are refused, or left out where the settings say so."""

        def read(values: dict[str, Any]) -> Body:
            if self.settings.unknown_fields == "warn":
                for place in leave_out_unknown(values, model)[:_MAX_LOGGED]:
                    _log.warning("unknown field", field=shown(place), request_id=request.state.request_id)
                return model.checked(values)
            with _telling_of_the_setting():
                return model.checked(values)

        return await self.json(request, read)


@contextmanager
def _telling_of_the_setting() -> Iterator[None]:
    """Add to a refusal of an unknown field which setting leaves it out instead."""
    try:
        yield
    except Refused as refused:
        body = refused.body
        if body.answer.code != "unknown_parameter":
            raise
        message = f"{body.message} (--unknown-fields warn leaves it out)"
        raise Refused(message, code=body.answer.code, param=body.param) from None


def make_gateway(settings: Settings, clients: Clients) -> Gateway:
    """Build the parts over connected clients."""
    catalog = Catalog()
    keyring = Keyring(trust_s=settings.key_trust_s)
    lease = Lease(catalog, clients.registry)
    return Gateway(
        settings=settings,
        clients=clients,
        catalog=catalog,
        keyring=keyring,
        lease=lease,
        guard=Guard(settings, clients.registry, keyring),
        limiter=Limiter(settings.limits_redis_url, max_requests=settings.max_requests),
        resolver=Resolver(clients.registry, clients.inference, catalog, lease),
        probing=Probing(clients.inference, catalog),
        metrics=Metrics(catalog.__len__, settings.metrics_adapters),
    )
