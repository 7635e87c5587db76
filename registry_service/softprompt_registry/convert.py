"""Protocol messages to the registry's values, and back."""

from functools import lru_cache

from google.protobuf.timestamp_pb2 import Timestamp
from softprompt_api.access import scope_to
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.quality import norms_from, norms_to, probe_to

from softprompt_registry.amendments import VersionUpdate
from softprompt_registry.api_keys import ApiKey, key_id
from softprompt_registry.catalog import AdapterVersion, BaseModel, EventType, Registration
from softprompt_registry.events import Event
from softprompt_registry.imports import ImportOrder
from softprompt_registry.watching import Change

_EVENT_TYPES = {
    EventType.REGISTERED: pb.ADAPTER_EVENT_TYPE_REGISTERED,
    EventType.VERSION_DELETED: pb.ADAPTER_EVENT_TYPE_VERSION_DELETED,
    EventType.ADAPTER_DELETED: pb.ADAPTER_EVENT_TYPE_ADAPTER_DELETED,
    EventType.ALIAS_SET: pb.ADAPTER_EVENT_TYPE_ALIAS_SET,
    EventType.ALIAS_REMOVED: pb.ADAPTER_EVENT_TYPE_ALIAS_REMOVED,
    EventType.UPDATED: pb.ADAPTER_EVENT_TYPE_UPDATED,
    EventType.KEY_CREATED: pb.ADAPTER_EVENT_TYPE_KEY_CREATED,
    EventType.KEY_REVOKED: pb.ADAPTER_EVENT_TYPE_KEY_REVOKED,
}


def registration_from(header: pb.RegisterAdapterHeader) -> Registration:
    """What a client says of an adapter."""
    return Registration(
        name=header.name,
        config_json=header.config_json,
        size_bytes=header.tensors_size_bytes,
        sha256=header.tensors_sha256,
        idempotency_key=header.idempotency_key,
        labels=dict(header.labels),
        base_model_id=header.base_model_id,
    )


def import_from(request: pb.ImportAdapterRequest) -> ImportOrder:
    """What a client wants imported."""
    return ImportOrder(
        name=request.name,
        source=request.source,
        idempotency_key=request.idempotency_key,
        labels=dict(request.labels),
        base_model_id=request.base_model_id,
    )


def update_from(request: pb.UpdateAdapterRequest) -> VersionUpdate:
    """What a client wants changed."""
    return VersionUpdate.of(request.update_mask.paths, labels=dict(request.labels), pinned=request.pinned)


def base_model_from(message: pb.BaseModel) -> BaseModel:
    """A fingerprint."""
    return BaseModel(
        id=message.id,
        architecture=message.architecture,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        vocab_size=message.vocab_size,
        tokenizer_sha256=message.tokenizer_sha256,
        max_virtual_tokens=message.max_virtual_tokens,
        dtype=message.dtype,
        no_key_values=message.no_key_values,
        max_lora_rank=message.max_lora_rank,
        vocabulary_norms=norms_from(message),
    )


@lru_cache(maxsize=64)
def base_model_to(model: BaseModel) -> pb.BaseModel:
    """A fingerprint's message, to be read only."""
    return pb.BaseModel(
        id=model.id,
        architecture=model.architecture,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        tokenizer_sha256=model.tokenizer_sha256,
        max_virtual_tokens=model.max_virtual_tokens,
        dtype=model.dtype,
        no_key_values=model.no_key_values,
        max_lora_rank=model.max_lora_rank,
        vocabulary_norms=norms_to(model.vocabulary_norms),
    )


def version_to(version: AdapterVersion) -> pb.AdapterVersion:
    """A version's message."""
    created_at = Timestamp()
    created_at.FromDatetime(version.created_at)
    return pb.AdapterVersion(
        name=version.name,
        version=version.version,
        id=version.id,
        digest=version.digest,
        kind=version.kind,
        num_virtual_tokens=version.num_virtual_tokens,
        hidden_size=version.hidden_size,
        dtype=version.dtype,
        size_bytes=version.size_bytes,
        tensors_sha256=version.tensors_sha256,
        config_json=version.config_json,
        base_model=base_model_to(version.base_model),
        created_at=created_at,
        labels=version.labels,
        num_tasks=version.num_tasks,
        rank=version.rank,
        row_norms=norms_to(version.row_norms),
        warnings=version.warnings,
        probe=probe_to(version.probe),
        aliases=version.aliases,
        pinned=version.pinned,
        revision=version.revision,
    )


def key_to(key: ApiKey) -> pb.ApiKey:
    """A key's message."""
    message = pb.ApiKey(
        id=key.id,
        sha256=key.sha256,
        tenant=key.tenant,
        scopes=[scope_to(scope) for scope in key.scopes],
        adapters=key.adapters,
        limits=pb.KeyLimits(
            requests_per_minute=key.limits.requests_per_minute,
            tokens_per_minute=key.limits.tokens_per_minute,
            parallel_requests=key.limits.parallel_requests,
        ),
        name=key.name,
    )
    message.created_at.FromDatetime(key.created_at)
    if key.expires_at is not None:
        message.expires_at.FromDatetime(key.expires_at)
    return message


def change_to(change: Change) -> pb.WatchAdaptersResponse:
    """What a watcher is told, as a message."""
    event = change.event
    if event is None:
        return pb.WatchAdaptersResponse(cursor=change.cursor, type=pb.ADAPTER_EVENT_TYPE_HEARTBEAT)
    message = pb.WatchAdaptersResponse(cursor=change.cursor, type=_EVENT_TYPES[event.type], alias=event.alias)
    if event.type is EventType.KEY_REVOKED:
        message.key.CopyFrom(pb.ApiKey(id=key_id(event.name), sha256=event.name))
    elif change.key is not None:
        message.key.CopyFrom(key_to(change.key))
    else:
        message.adapter.CopyFrom(version_to(change.version) if change.version else _named(event))
    return message


def _named(event: Event) -> pb.AdapterVersion:
    return pb.AdapterVersion(name=event.name, version=event.version, digest=event.digest)
