"""`GET /v1/resident_adapters`: which adapters are in the inference service's memory, and how they are used."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from softprompt_api.inference.v1.inference_pb2 import ResidentAdapter

from softprompt_gateway.gateway import Gateway
from softprompt_gateway.metrics import tier_name

Limit = Annotated[int, Query(ge=1, le=10_000, description="most adapters to list")]


def resident_router(gateway: Gateway) -> APIRouter:
    """The route, over one gateway's parts."""
    router = APIRouter()

    @router.get("/v1/resident_adapters")
    async def list_resident(limit: Limit = 1000) -> dict[str, Any]:
        """List the adapters in memory, the most recently used first."""
        answer = await gateway.clients.inference.resident(limit)
        return {
            "object": "list",
            "data": [_resident_json(one) for one in answer.adapters],
            "total_size": answer.total_size,
        }

    return router


def _resident_json(one: ResidentAdapter) -> dict[str, Any]:
    return {
        "object": "resident_adapter",
        "model": one.adapter,
        "digest": one.digest,
        "tier": tier_name(one.tier),
        "size_bytes": one.size_bytes,
        "num_virtual_tokens": one.num_virtual_tokens,
        "idle_s": round(one.idle_s, 3),
        "hits": one.hits,
        "in_use": one.in_use,
    }
