"""Whether the gateway and what it needs are well, what it counts, and which version it is."""

import asyncio
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from softprompt_api.access import Scope
from starlette.responses import JSONResponse, PlainTextResponse, Response

from softprompt_gateway.documented import AnswerModel, answered
from softprompt_gateway.gateway import Gateway


class Alive(AnswerModel):
    """Answer of `GET /health/live`."""

    status: Literal["ok"]


class Health(AnswerModel):
    """Answer of `GET /health/ready`."""

    status: Literal["ok", "degraded", "unavailable"]
    inference: Literal["serving", "not serving"]
    registry: Literal["serving", "not serving"]


class Version(AnswerModel):
    """Answer of `GET /version`."""

    version: str


ANSWER_MODELS = (Alive, Health, Version)


def health_router(gateway: Gateway) -> APIRouter:
    """Routes for orchestrators, monitors and people."""
    router = APIRouter(route_class=gateway.route(None))
    registry, inference = gateway.clients.registry, gateway.clients.inference
    healths = answered(Health, 200, 503)

    @router.get("/health/live", openapi_extra=answered(Alive))
    async def live() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @router.get("/health", openapi_extra=healths)
    @router.get("/health/ready", openapi_extra=healths)
    async def ready() -> JSONResponse:
        """Requests can be served; `degraded`: only with adapters that are known already."""
        serves, knows = await asyncio.gather(inference.serving(), registry.serving())
        status = "ok" if serves and knows else "degraded" if serves and gateway.catalog.synced else "unavailable"
        words = {True: "serving", False: "not serving"}
        body = {"status": status, "inference": words[serves], "registry": words[knows]}
        return JSONResponse(body, status_code=503 if status == "unavailable" else 200)

    async def metrics() -> Response:
        """Counters and gauges for Prometheus, those of all engines included."""
        return Response(gateway.metrics.exposition(await inference.loads()), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", openapi_extra=answered(Version))
    async def show_version() -> dict[str, str]:
        """The version of this software."""
        return {"version": version("softprompt")}

    # Of all tenants together: no tenant may see what others do.
    admins = gateway.route(Scope.ADMIN)
    router.add_api_route(
        "/metrics", metrics, methods=["GET"], response_class=PlainTextResponse, route_class_override=admins
    )
    return router
