"""The OpenAPI document: bodies and answers, which routes read and write themselves, errors, and who may call."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from softprompt_gateway.guard import GuardedRoute

_REF = "#/components/schemas/{model}"
_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
_ERROR = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
_REQUEST_ID = {"x-request-id": {"description": "the request's id", "required": True, "schema": {"type": "string"}}}
_ADAPTER_HEADERS = {
    "x-softprompt-adapter": "the versions that answered, joined by '+'; absent for the base model",
    "x-softprompt-adapter-digest": "their digests, joined by '+'",
}


class AnswerModel(BaseModel):
    """A part of an answer. It has these members and no others; one with a default may be absent."""

    model_config = ConfigDict(extra="forbid")


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route whose JSON body is one of these models."""
    schemas = [_ref(model) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answered(model: type[BaseModel], *statuses: int, links: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `openapi_extra` of a route that answers with this model.

    Args:
        statuses: those that it has; by default 200.
        links: where members of the answer lead, by `link`.
    """
    answer: dict[str, Any] = {"content": {"application/json": {"schema": _ref(model)}}}
    answer |= {"links": dict(links)} if links else {}
    return {"responses": {str(status): dict(answer) for status in statuses or (200,)}}


def generated(model: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that generates: it answers with `model`, or streams events of `event`."""
    payload = {"anyOf": [_ref(event), {"$ref": _REF.format(model="Error")}]}
    data = {
        "anyOf": [
            {"const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": payload},
        ]
    }
    extra = answered(model)
    [answer] = extra["responses"].values()
    answer["content"]["text/event-stream"] = {
        "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
    }
    answer["headers"] = {
        name: {"description": description, "schema": {"type": "string"}}
        for name, description in _ADAPTER_HEADERS.items()
    }
    return extra


def link(method: str, path: str, **parameters: str) -> dict[str, Any]:
    """A link to an operation, with what its parameters are in the answer."""
    pointer = path.replace("~", "~0").replace("/", "~1")
    return {"operationRef": f"#/paths/{pointer}/{method.lower()}", "parameters": parameters}


def document(app: FastAPI, routers: Sequence[APIRouter], models: Sequence[type[BaseModel]]) -> None:
    """Complete the app's OpenAPI document.

    Args:
        routers: all of the app's; their routes say who may call them.
        models: of bodies and answers.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            components = schema.setdefault("components", {})
            components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
            known = components.setdefault("schemas", {})
            known.update(definitions.get("$defs", {}), Error=_ERROR_SCHEMA)
            for unused in ("HTTPValidationError", "ValidationError"):
                known.pop(unused, None)
            for route in _guarded(routers):
                for method in route.methods or ():
                    _complete(schema["paths"][route.path_format][method.lower()], route)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}


def _guarded(routers: Sequence[APIRouter]) -> Iterator[GuardedRoute]:
    for router in routers:
        for route in router.routes:
            assert isinstance(route, GuardedRoute)
            yield route


def _complete(operation: dict[str, Any], route: GuardedRoute) -> None:
    """What every operation has: errors, the request's id, and the scope it needs where keys are asked for."""
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own shape of errors, which is none of ours
    responses["4XX"] = {"description": "The request is refused", "content": _ERROR}
    responses["5XX"] = {"description": "The request failed", "content": _ERROR}
    for response in responses.values():
        response["headers"] = response.get("headers", {}) | _REQUEST_ID
        for content in response.get("content", {}).values():
            if "$ref" in content["schema"]:  # and nothing that FastAPI guessed beside it
                content["schema"] = {"$ref": content["schema"]["$ref"]}
    operation["security"] = [] if route.wanted is None else [{"api_key": [route.wanted.value]}, {}]
