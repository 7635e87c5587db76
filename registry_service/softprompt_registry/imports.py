"""Registrations of files that the registry reads itself, from where its settings allow it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from softprompt_api.errors import DeadlineExceeded
from softprompt_api.names import check_full_name
from softprompt_api.shares import Shares
from softprompt_api.tenants import tenant_of

from softprompt_registry.catalog import AdapterVersion, Registration
from softprompt_registry.sources import PIECE_BYTES, Files, Folders, FolderSource, Hub, parse_source
from softprompt_registry.uploads import Piece, Uploads

MAX_IMPORTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    """What a client wants imported; fields as in the protocol."""

    name: str
    source: str
    idempotency_key: str
    labels: Mapping[str, str]
    base_model_id: str


class Imports:
    """Read adapters, a few at a time, and register them as uploads are.

    Args:
        timeout_s: for one.
    """

    def __init__(self, uploads: Uploads, folders: Folders, hub: Hub, *, timeout_s: float) -> None:
        self._uploads = uploads
        self._folders = folders
        self._hub = hub
        self._timeout_s = timeout_s
        self._running = Shares(MAX_IMPORTS, what="imports are running")

    async def run(self, order: ImportOrder) -> AdapterVersion:
        """Make the next version of a name from what its source holds."""
        check_full_name(order.name)
        try:
            with self._running.holding(tenant_of(order.name)):
                async with asyncio.timeout(self._timeout_s), self._read(order.source) as files:
                    return await self._uploads.register(_registration(order, files), _pieces(files))
        except TimeoutError:
            raise DeadlineExceeded(f"the import took more than {self._timeout_s:g} s") from None

    def _read(self, spelling: str) -> AbstractAsyncContextManager[Files]:
        source = parse_source(spelling)
        return self._folders.read(source) if isinstance(source, FolderSource) else self._hub.read(source)


def _registration(order: ImportOrder, files: Files) -> Registration:
    return Registration(
        name=order.name,
        config_json=files.config_json,
        size_bytes=files.size_bytes,
        sha256=files.sha256,
        idempotency_key=order.idempotency_key,
        labels=order.labels,
        base_model_id=order.base_model_id,
    )


async def _pieces(files: Files) -> AsyncIterator[Piece]:
    offset = 0
    while data := await asyncio.to_thread(files.tensors.read, PIECE_BYTES):
        yield Piece(offset=offset, data=data)
        offset += len(data)
