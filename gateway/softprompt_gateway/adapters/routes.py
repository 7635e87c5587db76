"""`/v1/adapters`: what admins do with adapters over HTTP.

An adapter is registered in one of three ways:

* `POST /v1/adapters` with JSON: name, config, tensors_base64;
* `POST /v1/adapters` with JSON: name, source, where the registry's settings allow that it reads files itself;
* `POST /v1/adapters/{name}` with the tensor file itself as `application/octet-stream`, its size as content-length,
  `x-adapter-config: <base64 of adapter_config.json>` and `x-adapter-sha256: <hex>`; optional `x-adapter-labels`
  (base64 of a JSON object), `x-adapter-base-model` and `idempotency-key`. Large files pass in chunks.
"""

from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query
from softprompt_api.errors import InvalidArgument, SoftpromptError
from softprompt_api.names import parse_adapter, parse_requested
from softprompt_api.registry.v1.registry_pb2 import (
    ImportAdapterResponse,
    ListAdaptersRequest,
    ListVersionsRequest,
    RegisterAdapterResponse,
    SetAliasRequest,
)
from starlette.requests import Request

from softprompt_gateway.adapters.schema import (
    AliasRequest,
    ImportRequest,
    RegisterRequest,
    UpdateRequest,
    adapter_json,
    nearest_json,
    upload_header,
)
from softprompt_gateway.adapters.upload import register, whole
from softprompt_gateway.body import body_chunks, check_encoding, content_length, discard
from softprompt_gateway.disconnect import unless_gone
from softprompt_gateway.documented import json_body
from softprompt_gateway.errors import Refused, fields_spelled
from softprompt_gateway.gateway import Gateway

REQUEST_MODELS = (RegisterRequest, ImportRequest, UpdateRequest, AliasRequest)
PageSize = Annotated[int, Query(ge=1, le=1000, description="adapters in one page")]
PageToken = Annotated[str, Query(max_length=1024, description="next_page_token of the page before")]
TopK = Annotated[int, Query(ge=1, le=20, description="tokens for each virtual token")]
Prefix = Annotated[str, Query(max_length=128, description="only names that start with this")]

_UPLOAD_DOCUMENTATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {"in": "header", "name": name, "required": required, "schema": {"type": "string"}, "description": text}
        for name, required, text in (
            ("x-adapter-config", True, "base64 of PEFT's adapter_config.json"),
            ("x-adapter-sha256", True, "hex sha256 of the body"),
            ("x-adapter-labels", False, "base64 of a JSON object of labels"),
            ("x-adapter-base-model", False, "id of the base model the adapter is for"),
            ("idempotency-key", False, "the same key with the same content answers with the same version"),
        )
    ],
}


def adapters_router(gateway: Gateway) -> APIRouter:
    """The routes, over one gateway's parts."""
    router = APIRouter(prefix="/v1/adapters")
    routes = _Routes(gateway)
    router.add_api_route("", routes.list_, methods=["GET"])
    router.add_api_route(
        "",
        routes.register,
        methods=["POST"],
        status_code=201,
        openapi_extra=json_body(RegisterRequest, ImportRequest),
    )
    router.add_api_route("/{adapter}", routes.show, methods=["GET"])
    router.add_api_route(
        "/{adapter}", routes.upload, methods=["POST"], status_code=201, openapi_extra=_UPLOAD_DOCUMENTATION
    )
    router.add_api_route("/{adapter}", routes.update, methods=["PATCH"], openapi_extra=json_body(UpdateRequest))
    router.add_api_route("/{adapter}", routes.delete, methods=["DELETE"])
    router.add_api_route("/{adapter}/versions", routes.versions, methods=["GET"])
    router.add_api_route("/{adapter}/probe", routes.probe, methods=["POST"])
    router.add_api_route("/{adapter}/nearest-tokens", routes.nearest_tokens, methods=["GET"])
    alias = "/{adapter}/aliases/{alias}"
    router.add_api_route(alias, routes.set_alias, methods=["PUT"], openapi_extra=json_body(AliasRequest))
    router.add_api_route(alias, routes.remove_alias, methods=["DELETE"])
    return router


class _Routes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._registry = gateway.clients.registry
        self._inference = gateway.clients.inference
        self._settings = gateway.settings

    async def list_(
        self, page_size: PageSize = 100, page_token: PageToken = "", prefix: Prefix = ""
    ) -> dict[str, Any]:
        """List the latest version of every adapter, in order of names, in pages."""
        page = await self._registry.list_adapters(
            ListAdaptersRequest(page_size=page_size, page_token=page_token, name_prefix=prefix)
        )
        return {
            "object": "list",
            "data": [adapter_json(version) for version in page.adapters],
            "next_page_token": page.next_page_token or None,
            "total_size": page.total_size,
        }

    async def show(self, adapter: str) -> dict[str, Any]:
        """Describe one version: `name`, `name@3`, `name@alias` or a digest."""
        spelling = str(parse_adapter(adapter))
        return adapter_json(await self._registry.get_adapter(spelling), with_config=True)

    async def versions(
        self, adapter: str, page_size: PageSize = 100, page_token: PageToken = ""
    ) -> dict[str, Any]:
        """List every version of one adapter, newest first, in pages."""
        name = self._name(adapter)
        page = await self._registry.list_versions(
            ListVersionsRequest(name=name, page_size=page_size, page_token=page_token)
        )
        return {
            "object": "list",
            "data": [adapter_json(version) for version in page.versions],
            "next_page_token": page.next_page_token or None,
        }

    async def register(self, request: Request) -> dict[str, Any]:
        """Register an adapter from JSON, or from a source that the registry reads; the next request can use it."""
        values = await self._gateway.json(request)
        if "source" in values:
            return await self._import(request, ImportRequest.checked(values))
        body = RegisterRequest.checked(values)
        tensors = body.tensors()
        with fields_spelled(base_model_id="base_model", tensors_sha256="sha256"):
            answer = await unless_gone(request, register(self._registry, body.header(tensors), whole(tensors)))
        return self._registered(answer)

    async def _import(self, request: Request, body: ImportRequest) -> dict[str, Any]:
        with fields_spelled(base_model_id="base_model"):
            answer = await unless_gone(request, self._registry.import_adapter(body.call()))
        return self._registered(answer)

    async def upload(self, request: Request, adapter: str) -> dict[str, Any]:
        """Register an adapter from its tensor file; the next request can use it."""
        check_encoding(request, "application/octet-stream")
        size_bytes = content_length(request)
        if size_bytes is None:
            raise Refused("content-length is required", code="length_required", status=411)
        chunks = body_chunks(
            request, limit_bytes=self._settings.max_upload_bytes, timeout_s=self._settings.upload_timeout_s
        )
        async with aclosing(chunks):
            try:
                header = upload_header(self._name(adapter), request.headers, size_bytes=size_bytes)
                answer = await register(self._registry, header, chunks)
            except (SoftpromptError, Refused):
                await discard(chunks)
                raise
        return self._registered(answer)

    async def probe(self, request: Request, adapter: str) -> dict[str, Any]:
        """Measure what a version does to the next token of a few fixed prompts, and keep the result with it."""
        spelling = str(parse_requested(adapter))
        version = await unless_gone(request, self._inference.probe_adapter(spelling))
        self._gateway.catalog.learn(version)
        return adapter_json(version)

    async def nearest_tokens(self, request: Request, adapter: str, top_k: TopK = 5) -> dict[str, Any]:
        """List the tokens of the vocabulary that are nearest to each virtual token."""
        spelling = str(parse_requested(adapter))
        return nearest_json(await unless_gone(request, self._inference.nearest_tokens(spelling, top_k)))

    async def update(self, request: Request, adapter: str) -> dict[str, Any]:
        """Change the labels of one version, or pin it: `name@3`, or what `name` or `name@alias` stands for."""
        spelling = str(parse_adapter(adapter))
        body = UpdateRequest.checked(await self._gateway.json(request))
        version = await self._registry.update_adapter(body.call(spelling))
        self._gateway.catalog.learn(version)
        return adapter_json(version)

    async def set_alias(self, request: Request, adapter: str, alias: str) -> dict[str, Any]:
        """Make an alias of a name point to a version; `latest` too, which is a rollback."""
        body = AliasRequest.checked(await self._gateway.json(request))
        version = await self._registry.set_alias(
            SetAliasRequest(
                name=self._name(adapter), alias=alias, version=body.version, expected_version=body.expected_version
            )
        )
        self._gateway.catalog.learn(version)
        return adapter_json(version)

    async def remove_alias(self, adapter: str, alias: str) -> dict[str, Any]:
        """Remove an alias of a name, not what it points to."""
        name = self._name(adapter)
        await self._registry.set_alias(SetAliasRequest(name=name, alias=alias))
        self._gateway.catalog.forget_alias(name, alias)
        return {"object": "alias.deleted", "id": f"{name}@{alias}", "deleted": True}

    async def delete(self, adapter: str) -> dict[str, Any]:
        """Delete `name` with all its versions, or only `name@3`."""
        ref = parse_adapter(adapter)
        if ref.digest or (ref.version is None and "@" in adapter):
            raise InvalidArgument("delete takes a name or name@number", field="adapter")
        if ref.version is None:
            deleted = await self._registry.delete_adapter(ref.name)
        else:
            await self._registry.delete_version(ref.name, ref.version)
            deleted = 1
        self._gateway.catalog.forget(ref.name, ref.version)
        return {"object": "adapter.deleted", "id": str(ref), "deleted": True, "deleted_versions": deleted}

    def _registered(self, answer: RegisterAdapterResponse | ImportAdapterResponse) -> dict[str, Any]:
        # The watch brings it too, a moment later; a listing right after this answer must have it.
        self._gateway.catalog.learn(answer.adapter)
        self._gateway.probing.want(answer.adapter)
        return adapter_json(answer.adapter) | {"warnings": list(answer.warnings)}

    @staticmethod
    def _name(adapter: str) -> str:
        ref = parse_adapter(adapter)
        if ref.digest or "@" in adapter:
            raise InvalidArgument("a plain adapter name is expected here, without a version", field="adapter")
        return ref.name
