"""Whether the gateway and what it needs are well, what it counts, and which version it is."""

import asyncio
from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from softprompt_api.access import Scope
from starlette.responses import JSONResponse, Response

from softprompt_gateway.gateway import Gateway


def health_router(gateway: Gateway) -> APIRouter:
    """Routes for orchestrators, monitors and people."""
    router = APIRouter(route_class=gateway.route(None))
    registry, inference = gateway.clients.registry, gateway.clients.inference

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @router.get("/health")
    @router.get("/health/ready")
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

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        """The version of this software."""
        return {"version": version("softprompt")}

    # Of all tenants together: no tenant may see what others do.
    router.add_api_route("/metrics", metrics, methods=["GET"], route_class_override=gateway.route(Scope.ADMIN))
    return router
