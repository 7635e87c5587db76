"""`GET /v1/resident_adapters`: which adapters are in the memory of each replica, and how they are used."""

from heapq import merge
from typing import Annotated, Any

from fastapi import APIRouter, Query
from softprompt_api.access import Scope
from softprompt_api.inference.v1.inference_pb2 import ResidentAdapter
from softprompt_api.tenants import local_name
from starlette.requests import Request

from softprompt_gateway.adapters.answers import ResidentList
from softprompt_gateway.caller import Caller
from softprompt_gateway.documented import answered
from softprompt_gateway.gateway import Gateway
from softprompt_gateway.metrics import tier_name

# As many as an inference service lists; tenants see those of them that are theirs.
_MAX_LISTED = 10_000
Limit = Annotated[int, Query(ge=1, le=_MAX_LISTED, description="most adapters to list")]


def resident_router(gateway: Gateway) -> APIRouter:
    """The route, over one gateway's parts."""
    router = APIRouter(route_class=gateway.route(Scope.ADMIN))

    @router.get("/v1/resident_adapters", openapi_extra=answered(ResidentList))
    async def list_resident(request: Request, limit: Limit = 1000) -> dict[str, Any]:
        """List the adapters in memory, the most recently used first."""
        caller = Caller.of(request)
        answers = await gateway.clients.inference.resident(_MAX_LISTED)
        own = [
            [(replica, one) for one in answer.adapters if caller.may_use(one.adapter.partition("@")[0])]
            for replica, answer in answers.items()
        ]
        shown = [_resident_json(replica, one) for replica, one in merge(*own, key=lambda each: each[1].idle_s)]
        return {"object": "list", "data": shown[:limit], "total_size": len(shown)}

    return router


def _resident_json(replica: str, one: ResidentAdapter) -> dict[str, Any]:
    return {
        "object": "resident_adapter",
        "replica": replica,
        "model": local_name(one.adapter),
        "digest": one.digest,
        "tier": tier_name(one.tier),
        "size_bytes": one.size_bytes,
        "num_virtual_tokens": one.num_virtual_tokens,
        "idle_s": round(one.idle_s, 3),
        "hits": one.hits,
        "in_use": one.in_use,
        "pinned": one.pinned,
    }
