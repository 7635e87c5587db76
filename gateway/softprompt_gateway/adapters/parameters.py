"""Parameters of the admin routes, as the OpenAPI document tells them; the routes parse paths and headers."""

from typing import Annotated, Any

from fastapi import Path, Query

from softprompt_gateway.documented import link

PREFIX = "[a-z0-9._-]*"
# As softprompt_api.names spells them. A few more are refused where they are parsed: names that are reserved.
_NAME = "[a-z0-9][a-z0-9._-]{0,127}"
_NUMBER = "@[1-9][0-9]{0,8}"
_ALIAS = "[a-z][a-z0-9._-]{0,127}"
_ANY = f"({_NAME}({_NUMBER}|@{_ALIAS})?|sha256:[0-9a-f]{{64}})"


def _told(pattern: str, description: str) -> Any:
    return Path(description=description, json_schema_extra={"pattern": f"^{pattern}$"})


Name = Annotated[str, _told(_NAME, "name")]
NameOrVersion = Annotated[str, _told(f"{_NAME}({_NUMBER})?", "name, or name@3 for one version")]
NamedVersion = Annotated[str, _told(f"{_NAME}({_NUMBER}|@{_ALIAS})?", "name, name@3 or name@alias")]
AnyVersion = Annotated[str, _told(_ANY, "name, name@3, name@alias or digest")]
AnyTask = Annotated[
    str, _told(f"{_ANY}(:[0-9]{{1,3}})?", "name, name@3, name@alias or digest, and a task behind it")
]
Alias = Annotated[str, _told(_ALIAS, "alias")]

PageSize = Annotated[int, Query(ge=1, le=1000, description="adapters in one page")]
PageToken = Annotated[str, Query(max_length=1024, description="next_page_token of the page before")]
TopK = Annotated[int, Query(ge=1, le=20, description="tokens for each virtual token")]
Prefix = Annotated[
    str,
    Query(
        max_length=128, description="only names that start with this", json_schema_extra={"pattern": f"^{PREFIX}$"}
    ),
]

Labels = Annotated[
    list[str],
    Query(
        default_factory=list,
        max_length=32,
        description="only adapters whose latest version has all of these, each KEY=VALUE; "
        "a page may then be short, or empty, and not be the last",
        json_schema_extra={"items": {"type": "string", "pattern": "^[^=]+="}},
    ),
]
Descending = Annotated[bool, Query(description="the last name first")]

UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    "parameters": [
        {"in": "header", "name": name, "required": required, "schema": schema, "description": text}
        for name, required, schema, text in (
            (
                "x-adapter-config",
                True,
                {"type": "string", "contentEncoding": "base64"},
                "base64 of PEFT's adapter_config.json",
            ),
            ("x-adapter-sha256", True, {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "hex sha256 of the body"),
            (
                "x-adapter-labels",
                False,
                {"type": "string", "contentEncoding": "base64"},
                "base64 of a JSON object of labels",
            ),
            ("x-adapter-base-model", False, {"type": "string"}, "id of the base model the adapter is for"),
            (
                "idempotency-key",
                False,
                {"type": "string", "maxLength": 128},
                "the same key with the same content answers with the same version",
            ),
        )
    ],
}


def links(version: str, name: str) -> dict[str, Any]:
    """Where an answer leads that has a version; `version` and `name` are where its spelling and its name stand."""
    one = "/v1/adapters/{adapter}"
    return {
        "show": link("GET", one, adapter=version),
        "update": link("PATCH", one, adapter=version),
        "probe": link("POST", f"{one}/probe", adapter=version),
        "nearest-tokens": link("GET", f"{one}/nearest-tokens", adapter=version),
        "versions": link("GET", f"{one}/versions", adapter=name),
        "alias": link("PUT", f"{one}/aliases/{{alias}}", adapter=name),
        "delete": link("DELETE", one, adapter=version),
    }
