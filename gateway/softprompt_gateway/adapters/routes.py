"""`/v1/adapters`: what admins do with adapters over HTTP.

An adapter is registered in one of three ways:

* `POST /v1/adapters` with JSON: name, config, tensors_base64;
* `POST /v1/adapters` with JSON: name, source, where the registry's settings allow that it reads files itself;
* `POST /v1/adapters/{name}` with the tensor file itself as `application/octet-stream`, its size as content-length,
  `x-adapter-config: <base64 of adapter_config.json>` and `x-adapter-sha256: <hex>`; optional `x-adapter-labels`
  (base64 of a JSON object), `x-adapter-base-model` and `idempotency-key`. Large files pass in chunks.
"""

import re
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastapi import APIRouter
from softprompt_api.access import Scope
from softprompt_api.audit import audited
from softprompt_api.errors import InvalidArgument, SoftpromptError
from softprompt_api.names import AdapterRef, parse_adapter, parse_requested, shown
from softprompt_api.registry.v1.registry_pb2 import (
    AdapterVersion,
    ImportAdapterResponse,
    ListAdaptersRequest,
    ListVersionsRequest,
    RegisterAdapterResponse,
    SetAliasRequest,
)
from softprompt_api.tenants import full_name, local_name
from starlette.requests import Request

from softprompt_gateway.adapters.answers import (
    AdapterAnswer,
    AdapterDeleted,
    AdapterList,
    AliasDeleted,
    NearestTokens,
    ShownAdapter,
    VersionList,
)
from softprompt_gateway.adapters.changes import Changes, plain_name
from softprompt_gateway.adapters.parameters import (
    PREFIX,
    UPLOAD,
    Alias,
    AnyTask,
    AnyVersion,
    Descending,
    Labels,
    Name,
    NamedVersion,
    NameOrVersion,
    PageSize,
    PageToken,
    Prefix,
    TopK,
    links,
)
from softprompt_gateway.adapters.schema import (
    AliasRequest,
    ImportRequest,
    RegisterRequest,
    UpdateRequest,
    adapter_json,
    nearest_json,
    parse_registration,
    upload_header,
)
from softprompt_gateway.adapters.upload import register, whole
from softprompt_gateway.body import body_chunks, check_encoding, content_length, discard
from softprompt_gateway.caller import Caller
from softprompt_gateway.catalog import spelling_of
from softprompt_gateway.disconnect import unless_gone
from softprompt_gateway.documented import answered, json_body, link
from softprompt_gateway.errors import Refused, fields_spelled
from softprompt_gateway.gateway import Gateway

REQUEST_MODELS = (RegisterRequest, ImportRequest, UpdateRequest, AliasRequest)
# More than a name may hold would be taken for another tenant's.
_PREFIX = re.compile(rf"{PREFIX}\Z")


def adapters_router(gateway: Gateway) -> APIRouter:
    """The routes, over one gateway's parts."""
    reads, writes = gateway.route(Scope.ADAPTERS_READ), gateway.route(Scope.ADAPTERS_WRITE)
    router = APIRouter(prefix="/v1/adapters", route_class=writes)
    routes = _Routes(gateway)
    version = answered(AdapterAnswer)
    registered = answered(AdapterAnswer, 201, links=links("$response.body#/model", "$response.body#/name"))
    listed = answered(AdapterList, links=links("$response.body#/data/0/model", "$response.body#/data/0/name"))
    router.add_api_route("", routes.list_, methods=["GET"], openapi_extra=listed, route_class_override=reads)
    router.add_api_route(
        "",
        routes.register,
        methods=["POST"],
        status_code=201,
        openapi_extra=json_body(RegisterRequest, ImportRequest) | registered,
    )
    router.add_api_route(
        "/{adapter}",
        routes.show,
        methods=["GET"],
        openapi_extra=answered(ShownAdapter),
        route_class_override=reads,
    )
    router.add_api_route(
        "/{adapter}",
        routes.upload,
        methods=["POST"],
        status_code=201,
        openapi_extra=UPLOAD | registered,
    )
    router.add_api_route(
        "/{adapter}", routes.update, methods=["PATCH"], openapi_extra=json_body(UpdateRequest) | version
    )
    router.add_api_route("/{adapter}", routes.delete, methods=["DELETE"], openapi_extra=answered(AdapterDeleted))
    router.add_api_route(
        "/{adapter}/versions",
        routes.versions,
        methods=["GET"],
        openapi_extra=answered(VersionList),
        route_class_override=reads,
    )
    router.add_api_route("/{adapter}/probe", routes.probe, methods=["POST"], openapi_extra=version)
    router.add_api_route(
        "/{adapter}/nearest-tokens",
        routes.nearest_tokens,
        methods=["GET"],
        openapi_extra=answered(NearestTokens),
        route_class_override=reads,
    )
    alias = "/{adapter}/aliases/{alias}"
    named = {"adapter": "$request.path.adapter", "alias": "$request.path.alias"}
    aliased = answered(AdapterAnswer, links={"remove": link("DELETE", f"/v1/adapters{alias}", **named)})
    router.add_api_route(alias, routes.set_alias, methods=["PUT"], openapi_extra=json_body(AliasRequest) | aliased)
    router.add_api_route(alias, routes.remove_alias, methods=["DELETE"], openapi_extra=answered(AliasDeleted))
    return router


def _parse_labels(texts: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not key or not sign:
            raise InvalidArgument("each of labels must be KEY=VALUE", field="labels")
        if labels.setdefault(key, value) != value:
            raise InvalidArgument("labels want two values of one key, and no adapter has both", field="labels")
    return labels


class _Routes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._registry = gateway.clients.registry
        self._inference = gateway.clients.inference
        self._settings = gateway.settings
        self._changes = Changes(gateway)

    async def list_(
        self,
        request: Request,
        labels: Labels,
        page_size: PageSize = 100,
        page_token: PageToken = "",
        prefix: Prefix = "",
        descending: Descending = False,
    ) -> dict[str, Any]:
        """List the latest version of every adapter, in order of names, in pages."""
        caller = Caller.of(request)
        if not _PREFIX.match(prefix):
            raise InvalidArgument("prefix must be the beginning of an adapter's name", field="prefix")
        page = await self._registry.list_adapters(
            ListAdaptersRequest(
                page_size=page_size,
                page_token=page_token,
                name_prefix=full_name(caller.tenant, prefix),
                labels=_parse_labels(labels),
                descending=descending,
            )
        )
        return {
            "object": "list",
            "data": [
                adapter_json(caller.told(version)) for version in page.adapters if caller.may_use(version.name)
            ],
            "next_page_token": page.next_page_token or None,
            "total_size": page.total_size,
        }

    async def show(self, request: Request, adapter: AnyVersion) -> dict[str, Any]:
        """Describe one version: `name`, `name@3`, `name@alias` or a digest."""
        caller = Caller.of(request)
        version = await self._version(caller, parse_adapter(adapter))
        return adapter_json(caller.told(version), with_config=True)

    async def versions(
        self, request: Request, adapter: Name, page_size: PageSize = 100, page_token: PageToken = ""
    ) -> dict[str, Any]:
        """List every version of one adapter, newest first, in pages."""
        caller = Caller.of(request)
        page = await self._registry.list_versions(
            ListVersionsRequest(name=self._name(caller, adapter), page_size=page_size, page_token=page_token)
        )
        return {
            "object": "list",
            "data": [adapter_json(caller.told(version)) for version in page.versions],
            "next_page_token": page.next_page_token or None,
        }

    async def register(self, request: Request) -> dict[str, Any]:
        """Register an adapter from JSON, or from a source that the registry reads; the next request can use it."""
        caller, body = Caller.of(request), await self._gateway.json(request, parse_registration)
        if isinstance(body, ImportRequest):
            with fields_spelled(base_model_id="base_model"):
                return self._shown(caller, await self._changes.import_(request, body.call()))
        moment = self._gateway.catalog.moment
        with audited("adapter.register", adapter=shown(body.name), **caller.facts()):
            name, tensors = caller.new_name(body.name), body.tensors()
            with fields_spelled(base_model_id="base_model", tensors_sha256="sha256"):
                header = body.header(name, tensors)
                header.base_model_id = header.base_model_id or await self._changes.default_base()
                answer = await unless_gone(request, register(self._registry, header, whole(tensors)))
        return self._registered(caller, answer, moment)

    async def upload(self, request: Request, adapter: Name) -> dict[str, Any]:
        """Register an adapter from its tensor file; the next request can use it."""
        caller = Caller.of(request)
        check_encoding(request, "application/octet-stream")
        size_bytes, moment = content_length(request), self._gateway.catalog.moment
        if size_bytes is None:
            raise Refused("content-length is required", code="length_required", status=411)
        chunks = body_chunks(
            request, limit_bytes=self._settings.max_upload_bytes, timeout_s=self._settings.upload_timeout_s
        )
        async with aclosing(chunks):
            try:
                with audited("adapter.register", adapter=shown(adapter), **caller.facts()):
                    name = self._name(caller, adapter)
                    header = upload_header(name, request.headers, size_bytes=size_bytes)
                    header.base_model_id = header.base_model_id or await self._changes.default_base()
                    answer = await register(self._registry, header, chunks)
            except (SoftpromptError, Refused):
                with suppress(Refused):
                    await discard(chunks)
                raise
        return self._registered(caller, answer, moment)

    async def probe(self, request: Request, adapter: AnyVersion) -> dict[str, Any]:
        """Measure what a version does to the next token of a few fixed prompts, and keep the result with it."""
        caller, ref = Caller.of(request), parse_adapter(adapter)
        with audited("adapter.probe", adapter=str(ref), **caller.facts()):
            moment = self._gateway.catalog.moment
            version = await self._version(caller, ref)
            version = await unless_gone(request, self._inference.probe_adapter(version))
        self._gateway.catalog.learn(version, asked_at=moment)
        return adapter_json(caller.told(version))

    async def nearest_tokens(self, request: Request, adapter: AnyTask, top_k: TopK = 5) -> dict[str, Any]:
        """List the tokens of the vocabulary that are nearest to each virtual token."""
        caller, ref = Caller.of(request), parse_requested(adapter)
        version = await self._version(caller, ref.whole)
        answer = await unless_gone(request, self._inference.nearest_tokens(version, ref.task, top_k))
        return nearest_json(caller.told(version), answer)

    async def update(self, request: Request, adapter: NamedVersion) -> dict[str, Any]:
        """Change the labels of one version, or pin it: `name@3`, or what `name` or `name@alias` stands for."""
        caller, ref = Caller.of(request), parse_adapter(adapter)
        body = await self._gateway.json(request, UpdateRequest.checked)
        with audited("adapter.update", adapter=str(ref), **caller.facts()):
            moment = self._gateway.catalog.moment
            version = await self._registry.update_adapter(body.call(str(caller.own(ref))))
        self._gateway.catalog.learn(version, asked_at=moment)
        return adapter_json(caller.told(version))

    async def set_alias(self, request: Request, adapter: Name, alias: Alias) -> dict[str, Any]:
        """Make an alias of a name point to a version; `latest` too, which is a rollback."""
        caller = Caller.of(request)
        body = await self._gateway.json(request, AliasRequest.checked)
        with audited("alias.set", adapter=shown(adapter), alias=shown(alias), **caller.facts()) as facts:
            facts["version"] = body.version
            moment = self._gateway.catalog.moment
            version = await self._registry.set_alias(
                SetAliasRequest(
                    name=self._name(caller, adapter),
                    alias=alias,
                    version=body.version,
                    expected_version=body.expected_version,
                )
            )
        self._gateway.catalog.learn(version, asked_at=moment)
        return adapter_json(caller.told(version))

    async def remove_alias(self, request: Request, adapter: Name, alias: Alias) -> dict[str, Any]:
        """Remove an alias of a name, not what it points to."""
        caller = Caller.of(request)
        with audited("alias.remove", adapter=shown(adapter), alias=shown(alias), **caller.facts()):
            name, moment = self._name(caller, adapter), self._gateway.catalog.moment
            await self._registry.set_alias(SetAliasRequest(name=name, alias=alias))
        self._gateway.catalog.forget_alias(name, alias, asked_at=moment)
        return {"object": "alias.deleted", "id": f"{local_name(name)}@{alias}", "deleted": True}

    async def delete(self, request: Request, adapter: NameOrVersion) -> dict[str, Any]:
        """Delete `name` with all its versions, or only `name@3`."""
        caller, asked = Caller.of(request), parse_adapter(adapter)
        if asked.digest or (asked.version is None and "@" in adapter):
            raise InvalidArgument("delete takes a name or name@number", field="adapter")
        deleted = await self._changes.delete(caller, asked)
        return {"object": "adapter.deleted", "id": str(asked), "deleted": True, "deleted_versions": deleted}

    def _registered(self, caller: Caller, answer: RegisterAdapterResponse, moment: int) -> dict[str, Any]:
        self._changes.registered(answer.adapter, asked_at=moment)
        return self._shown(caller, answer)

    @staticmethod
    def _shown(caller: Caller, answer: RegisterAdapterResponse | ImportAdapterResponse) -> dict[str, Any]:
        return adapter_json(caller.told(answer.adapter)) | {"warnings": list(answer.warnings)}

    async def _version(self, caller: Caller, ref: AdapterRef) -> AdapterVersion:
        """The version of the caller's that a spelling stands for."""
        version = await self._registry.get_adapter(str(caller.own(ref)))
        usable = self._gateway.resolver.usable(caller, ref, version)
        return version if usable is version else await self._registry.get_adapter(spelling_of(usable))

    @staticmethod
    def _name(caller: Caller, adapter: str) -> str:
        return caller.own(plain_name(adapter)).name
