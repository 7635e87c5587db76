"""The HTTP application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from softprompt_api.errors import InternalError, SoftpromptError
from softprompt_api.tracing import Tracer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from softprompt_gateway.adapters.answers import ANSWER_MODELS as ADAPTER_ANSWERS
from softprompt_gateway.adapters.loading import REQUEST_MODELS as LOADING_MODELS
from softprompt_gateway.adapters.loading import loading_router
from softprompt_gateway.adapters.resident import resident_router
from softprompt_gateway.adapters.routes import REQUEST_MODELS as ADAPTER_MODELS
from softprompt_gateway.adapters.routes import adapters_router
from softprompt_gateway.admission import Admission
from softprompt_gateway.clients import Clients
from softprompt_gateway.cors import CorsHeaders, Preflights
from softprompt_gateway.disconnect import stop
from softprompt_gateway.docs_page import docs_routes
from softprompt_gateway.documented import document
from softprompt_gateway.errors import Refused, describe
from softprompt_gateway.gateway import Gateway, make_gateway
from softprompt_gateway.guard import GuardedRoute
from softprompt_gateway.health import ANSWER_MODELS as HEALTH_ANSWERS
from softprompt_gateway.health import health_router
from softprompt_gateway.middleware import Edge
from softprompt_gateway.openai.answers import ANSWER_MODELS as OPENAI_ANSWERS
from softprompt_gateway.openai.routes import REQUEST_MODELS as OPENAI_MODELS
from softprompt_gateway.openai.routes import openai_router
from softprompt_gateway.settings import Settings
from softprompt_gateway.unrouted import explainer
from softprompt_gateway.watch import CatalogWatcher

_DESCRIPTION = "OpenAI-compatible requests over one base model and its adapters, and the adapters' administration."

# The edge traces and counts requests; FastAPI's own would send exceptions' texts wherever the environment says.
_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def make_app(
    settings: Settings, clients: Clients, admission: Admission | None = None, tracer: Tracer | None = None
) -> FastAPI:
    """The application over connected clients; whoever opened them and the tracer closes them.

    Args:
        admission: lets requests in, until whoever has it too stops it.
    """
    admission = admission or Admission(settings.max_requests)
    gateway = make_gateway(settings, clients)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(CatalogWatcher(gateway.catalog, gateway.keyring, clients.registry).run())
        leasing = asyncio.create_task(gateway.lease.run())
        yield
        await stop(leasing)
        await stop(watching)
        await gateway.resolver.close()
        await gateway.probing.close()
        await gateway.limiter.close()

    app = FastAPI(
        title="Softprompt",
        version=version("softprompt"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        # A redirect's location would repeat the client's Host header.
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    app.router.routes += docs_routes()
    app.add_exception_handler(SoftpromptError, _explain)
    app.add_exception_handler(Refused, _explain)
    routers = (
        openai_router(gateway),
        adapters_router(gateway),
        loading_router(gateway),
        resident_router(gateway),
        health_router(gateway),
    )
    app.add_exception_handler(HTTPException, explainer(routers))
    app.add_exception_handler(RequestValidationError, _explain_parameter)
    _add_layers(app, gateway, admission, tracer)
    assert all(isinstance(route, GuardedRoute) for router in routers for route in router.routes)
    for router in routers:
        app.include_router(router)
    models = (
        *(*OPENAI_MODELS, *OPENAI_ANSWERS, *ADAPTER_MODELS, *ADAPTER_ANSWERS),
        *(*LOADING_MODELS, *HEALTH_ANSWERS),
    )
    document(app, routers, models)
    return app


def _add_layers(app: FastAPI, gateway: Gateway, admission: Admission, tracer: Tracer | None) -> None:
    """What is around the routes, from the inside out."""
    origins = gateway.settings.origins
    if origins:
        app.add_middleware(Preflights, origins=origins)
    app.add_middleware(Edge, metrics=gateway.metrics, admission=admission, tracer=tracer)
    if origins:
        app.add_middleware(CorsHeaders, origins=origins)


async def _explain(_request: Request, error: Exception) -> Response:
    if isinstance(error, InternalError):
        raise error  # to the edge, which logs it
    return describe(error).response()


async def _explain_parameter(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return describe(
        Refused(f"{param}: {first['msg'].removeprefix('Input ')}", code="invalid_value", param=param)
    ).response()
