"""KeyService on the wire: parse, call, format. What is made or revoked is logged, and never a key's text."""

# gRPC names the methods and their arguments.
# ruff: noqa: N802

from datetime import UTC, datetime
from typing import Any

import grpc
from softprompt_api.access import scope_from
from softprompt_api.audit import audited
from softprompt_api.errors import InvalidArgument, KeyNotFound
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc
from softprompt_api.tenants import DEFAULT_TENANT

from softprompt_registry.api_keys import KeyDraft, KeyLimits
from softprompt_registry.convert import key_to
from softprompt_registry.key_store import KeyStore

Context = grpc.aio.ServicerContext[Any, Any]


class KeyServicer(registry_pb2_grpc.KeyServiceServicer):
    """Serve a KeyStore."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        with audited("key.create", peer=context.peer()) as facts:
            draft = _draft_from(request)
            facts |= {"tenant": draft.tenant, "scopes": list(draft.scopes)}
            text, key = await self._keys.create(draft)
            facts["created"] = key.id
        return pb.CreateKeyResponse(key=text, api_key=key_to(key))

    async def GetKey(self, request: pb.GetKeyRequest, context: Context) -> pb.GetKeyResponse:  # noqa: ARG002
        key = await self._keys.find(request.sha256)
        if key is None:
            raise KeyNotFound("there is no such API key", field="sha256")
        return pb.GetKeyResponse(api_key=key_to(key))

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:  # noqa: ARG002
        page = await self._keys.page(size=request.page_size, token=request.page_token)
        return pb.ListKeysResponse(
            api_keys=[key_to(key) for key in page.keys],
            next_page_token=page.next_token,
            ever_made=page.ever_made,
        )

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        with audited("key.revoke", peer=context.peer()) as facts:
            await self._keys.revoke(request.id)
            facts["revoked"] = request.id
        return pb.RevokeKeyResponse()


def _draft_from(request: pb.CreateKeyRequest) -> KeyDraft:
    scopes = [scope_from(value) for value in request.scopes]
    if None in scopes:
        raise InvalidArgument("scopes: there is no such scope", field="scopes")
    limits = request.limits
    return KeyDraft(
        tenant=request.tenant or DEFAULT_TENANT,
        name=request.name,
        scopes=tuple(scope for scope in scopes if scope is not None),
        adapters=tuple(request.adapters),
        limits=KeyLimits(
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            parallel_requests=limits.parallel_requests,
        ),
        expires_at=_time_from(request) if request.HasField("expires_at") else None,
    )


def _time_from(request: pb.CreateKeyRequest) -> datetime:
    try:
        return request.expires_at.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidArgument("expires_at is not a time", field="expires_at") from None
