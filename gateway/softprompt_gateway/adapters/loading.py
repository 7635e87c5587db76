"""Routes under which scripts written for vLLM and Aphrodite load adapters from a path, and unload them.

What is loaded is imported, as `POST /v1/adapters` with `source` does it, and what is unloaded is deleted. Either
pair of routes takes every kind of adapter: its file says which it is.
"""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter
from pydantic import Field
from softprompt_api.access import Scope
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import shown
from softprompt_api.registry.v1.registry_pb2 import ImportAdapterRequest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from softprompt_gateway.adapters.changes import Changes, plain_name
from softprompt_gateway.adapters.schema import Name
from softprompt_gateway.caller import Caller
from softprompt_gateway.documented import json_body
from softprompt_gateway.errors import fields_spelled
from softprompt_gateway.gateway import Gateway
from softprompt_gateway.validation import RequestModel

Location = Annotated[
    str,
    Field(
        max_length=2048,
        description="a folder of the registry's machine, or owner/name of a repository of the hub, where allowed",
        json_schema_extra={"pattern": "^(hf://|file:|/|[^/]+/[^/]+$)"},
    ),
]
InPlace = Annotated[
    bool | None, Field(description="whether a name that is there already gets a new version; default false")
]


class LoadLoraRequest(RequestModel):
    """Body of `POST /v1/load_lora_adapter`."""

    lora_name: Name
    lora_path: Location
    load_inplace: InPlace = None


class UnloadLoraRequest(RequestModel):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: Name
    lora_int_id: Any = Field(None, description="accepted, without effect")


class LoadPromptAdapterRequest(RequestModel):
    """Body of `POST /v1/load_prompt_adapter`."""

    prompt_adapter_name: Name
    prompt_adapter_path: Location
    load_inplace: InPlace = None


class UnloadPromptAdapterRequest(RequestModel):
    """Body of `POST /v1/unload_prompt_adapter`."""

    prompt_adapter_name: Name
    prompt_adapter_id: Any = Field(None, description="accepted, without effect")


REQUEST_MODELS = (LoadLoraRequest, UnloadLoraRequest, LoadPromptAdapterRequest, UnloadPromptAdapterRequest)


def loading_router(gateway: Gateway) -> APIRouter:
    """The routes, over one gateway's parts."""
    router = APIRouter(prefix="/v1", route_class=gateway.route(Scope.ADAPTERS_WRITE))
    routes = _Routes(gateway)
    for path, handler, model in (
        ("/load_lora_adapter", routes.load_lora, LoadLoraRequest),
        ("/unload_lora_adapter", routes.unload_lora, UnloadLoraRequest),
        ("/load_prompt_adapter", routes.load_prompt_adapter, LoadPromptAdapterRequest),
        ("/unload_prompt_adapter", routes.unload_prompt_adapter, UnloadPromptAdapterRequest),
    ):
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            openapi_extra=json_body(model),
            response_class=PlainTextResponse,
        )
    return router


def source_of(path: str) -> str:
    """How the registry spells what such scripts call a path; InvalidArgument for what can be none."""
    if path.startswith(("hf://", "file:")):
        return path
    if path.startswith("/"):
        return f"file://{quote(path)}"
    if path.count("/") == 1:
        return f"hf://{path}"
    raise InvalidArgument(
        f"{shown(path)} is neither an absolute path nor owner/name of a repository of the hub", field="source"
    )


class _Routes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._changes = Changes(gateway)

    async def load_lora(self, request: Request) -> str:
        """Register a LoRA, or another adapter, from a path; the next request can use it."""
        body = await self._gateway.json(request, LoadLoraRequest.checked)
        await self._load(request, "lora", body.lora_name, body.lora_path, in_place=body.load_inplace)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    async def unload_lora(self, request: Request) -> str:
        """Delete a LoRA, or another adapter, with all its versions."""
        body = await self._gateway.json(request, UnloadLoraRequest.checked)
        await self._unload(request, "lora", body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    async def load_prompt_adapter(self, request: Request) -> str:
        """Register a soft prompt, or another adapter, from a path; the next request can use it."""
        body = await self._gateway.json(request, LoadPromptAdapterRequest.checked)
        name, path = body.prompt_adapter_name, body.prompt_adapter_path
        await self._load(request, "prompt_adapter", name, path, in_place=body.load_inplace)
        return f"Success: prompt adapter '{name}' added successfully."

    async def unload_prompt_adapter(self, request: Request) -> str:
        """Delete a soft prompt, or another adapter, with all its versions."""
        body = await self._gateway.json(request, UnloadPromptAdapterRequest.checked)
        await self._unload(request, "prompt_adapter", body.prompt_adapter_name)
        return f"Success: prompt adapter '{body.prompt_adapter_name}' removed successfully."

    async def _load(self, request: Request, prefix: str, name: str, path: str, *, in_place: bool | None) -> None:
        with fields_spelled(name=f"{prefix}_name", adapter=f"{prefix}_name", source=f"{prefix}_path"):
            call = ImportAdapterRequest(name=name, source=source_of(path))
            await self._changes.import_(request, call, must_be_new=not in_place)

    async def _unload(self, request: Request, prefix: str, name: str) -> None:
        with fields_spelled(name=f"{prefix}_name", adapter=f"{prefix}_name"):
            await self._changes.delete(Caller.of(request), plain_name(name))
