"""`/v1/models`: the base models and every adapter, as model cards."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from typing import Any

from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.names import join_model, with_task
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion

from softprompt_gateway.catalog import spelling_of
from softprompt_gateway.resolve import Bound

OWNER = "softprompt"
_CARDS_AT_ONCE = 100


def base_card(served: GetModelResponse) -> dict[str, Any]:
    """The base model: its own root, without a parent."""
    return {
        "id": served.base_model.id,
        "object": "model",
        "created": served.ready_unix_s,
        "owned_by": OWNER,
        "root": served.base_model.id,
        "parent": None,
        "max_model_len": served.max_model_len,
    }


def adapter_cards(version: AdapterVersion, served: GetModelResponse) -> Iterator[dict[str, Any]]:
    """The models that an adapter's latest version is: one, or one for each of its tasks."""
    for task in range(version.num_tasks) if version.num_tasks else (None,):
        yield adapter_card(version, served, task=task, id_=with_task(version.name, task))


def adapter_card(
    version: AdapterVersion, served: GetModelResponse, *, task: int | None, id_: str
) -> dict[str, Any]:
    """An adapter: its root is the exact version that its name stands for, its parent the base model."""
    return {
        "id": id_,
        "object": "model",
        "created": version.created_at.seconds,
        "owned_by": OWNER,
        "root": with_task(spelling_of(version), task),
        "parent": version.base_model.id or served.base_model.id,
        "max_model_len": served.max_model_len,
        "adapter": _adapter(version),
    }


def composed_card(adapters: Sequence[Bound], served: GetModelResponse, *, id_: str) -> dict[str, Any]:
    """Several adapters put together: its root is the exact versions, its parent the base model."""
    return {
        "id": id_,
        "object": "model",
        "created": max(bound.version.created_at.seconds for bound in adapters),
        "owned_by": OWNER,
        "root": join_model(bound.spelling for bound in adapters),
        "parent": served.base_model.id,
        "max_model_len": served.max_model_len,
        "adapters": [{"name": bound.version.name, **_adapter(bound.version)} for bound in adapters],
    }


def _adapter(version: AdapterVersion) -> dict[str, Any]:
    return {
        "kind": version.kind,
        "version": version.version,
        "digest": version.digest,
        "num_virtual_tokens": version.num_virtual_tokens,
        "rank": version.rank,
        "state": "ready",  # whatever cannot be used is no model: it is not told of at all
    }


async def listing(cards: Iterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The JSON of a list of cards, in pieces: all of a hundred thousand at once would keep others waiting."""
    start = b'{"object":"list","data":['
    while batch := list(islice(cards, _CARDS_AT_ONCE)):
        yield start + ",".join(json.dumps(card, separators=(",", ":")) for card in batch).encode()
        start = b","
        await asyncio.sleep(0)
    yield b"]}"
