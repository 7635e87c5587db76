"""The HTTP application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from softprompt_api.errors import InternalError, SoftpromptError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from softprompt_gateway.adapters.routes import REQUEST_MODELS as ADAPTER_MODELS
from softprompt_gateway.adapters.routes import adapters_router
from softprompt_gateway.clients import Clients
from softprompt_gateway.disconnect import stop
from softprompt_gateway.documented import document
from softprompt_gateway.errors import Refused, describe
from softprompt_gateway.gateway import make_gateway
from softprompt_gateway.health import health_router
from softprompt_gateway.middleware import Edge
from softprompt_gateway.openai.routes import REQUEST_MODELS as OPENAI_MODELS
from softprompt_gateway.openai.routes import openai_router
from softprompt_gateway.settings import Settings
from softprompt_gateway.watch import CatalogWatcher

_DESCRIPTION = "OpenAI-compatible requests over one base model and its adapters, and the adapters' administration."
_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(settings: Settings, clients: Clients) -> FastAPI:
    """The application over connected clients; whoever opened them closes them."""
    gateway = make_gateway(settings, clients)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(CatalogWatcher(gateway.catalog, clients.registry).run())
        yield
        await stop(watching)

    app = FastAPI(
        title="Softprompt",
        version=version("softprompt"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        # A redirect's location would repeat the client's Host header.
        redirect_slashes=False,
    )
    app.add_exception_handler(SoftpromptError, _explain)
    app.add_exception_handler(Refused, _explain)
    app.add_exception_handler(HTTPException, _explain_http)
    app.add_exception_handler(RequestValidationError, _explain_parameter)
    app.add_middleware(Edge, metrics=gateway.metrics)
    app.include_router(openai_router(gateway))
    app.include_router(adapters_router(gateway))
    app.include_router(health_router(gateway))
    document(app, [*OPENAI_MODELS, *ADAPTER_MODELS])
    return app


async def _explain(_request: Request, error: Exception) -> Response:
    if isinstance(error, InternalError):
        raise error  # to the edge, which logs it
    return describe(error).response()


async def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method[:16]} is not allowed here" if error.status_code == 405 else "there is no such route"
    )
    code = _CODES.get(error.status_code, "invalid_request")
    return describe(Refused(message, code=code, status=error.status_code, headers=error.headers)).response()


async def _explain_parameter(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    return describe(Refused(f"{param}: {first['msg']}", code="invalid_value", param=param)).response()
