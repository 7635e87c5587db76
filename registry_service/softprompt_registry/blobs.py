"""Tensor files in the store: staged while they arrive, published whole, read with every chunk's digest checked."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from softprompt_api.errors import AdapterNotFound, DataCorrupted, InvalidArgument

from softprompt_registry import keys
from softprompt_registry.connection import reads, reply, writes
from softprompt_registry.scripts import read_fields

CHUNK_BYTES = 2**20
# Of a chunk: more at once would keep a reader busy that takes its time for each.
_PIECE_BYTES = 2**18
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """What is stored beside a blob's chunks.

    Attributes:
        chunk_digests: the sha256 of every chunk, one after the other, 32 bytes each.
    """

    sha256: str
    size_bytes: int
    chunk_digests: bytes

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_digests) // _DIGEST_BYTES

    def digest_of(self, index: int) -> bytes:
        """sha256 of a chunk."""
        return self.chunk_digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobStart:
    """What the store holds of a blob, and one of its chunks: most blobs have no other.

    Attributes:
        chunk: None where it is missing.
    """

    facts: Mapping[bytes, bytes]
    chunk: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobUse:
    """What must be known of a blob to delete it."""

    num_versions: int
    num_chunks: int


class StagedBlob:
    """One upload's chunks in the store: invisible, and gone after a while unless they are published.

    Bytes are regrouped into chunks of one size, whatever the sizes they arrive in; at most one chunk is in memory.
    The last one stays there until the publication itself writes it: most soft prompts are one chunk, one write.
    """

    def __init__(self, client: Redis, sha256: str, *, ttl_s: int) -> None:
        self._client = client
        self._sha256 = sha256
        self._ttl_s = ttl_s
        self._upload = secrets.token_hex(8)
        self._buffer = bytearray()
        self._digests = bytearray()
        self._size_bytes = 0

    @property
    def keys(self) -> list[str]:
        """The staged chunks' keys, in order; without the last chunk's, which is not staged."""
        count = len(self._digests) // _DIGEST_BYTES
        return [keys.staged(self._sha256, self._upload, index) for index in range(count)]

    async def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._size_bytes += len(data)
        self._buffer += data
        while len(self._buffer) > CHUNK_BYTES:
            await self._put(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    @writes
    async def discard(self) -> None:
        """Remove what was staged; nothing to remove is fine."""
        if staged := self.keys:
            await self._client.unlink(*staged)

    def publish(self, transaction: Pipeline) -> None:
        """Queue the commands that make the chunks the blob, used by one more version.

        Chunks that are there already are replaced by the same, freshly verified, bytes.
        """
        staged = self.keys
        for index, key in enumerate(staged):
            transaction.rename(key, keys.chunk(self._sha256, index))
            transaction.persist(keys.chunk(self._sha256, index))
        last = bytes(self._buffer)
        transaction.set(keys.chunk(self._sha256, len(staged)), last)
        facts: dict[Any, Any] = {
            "sha256": self._sha256,
            "size_bytes": self._size_bytes,
            "chunk_digests": bytes(self._digests) + hashlib.sha256(last).digest(),
        }
        transaction.hset(keys.blob(self._sha256), mapping=facts)
        # Counted by the store, not read before: publications of equal contents need not wait for one another.
        transaction.hincrby(keys.blob(self._sha256), "num_versions", 1)

    @writes
    async def _put(self, chunk: bytes) -> None:
        index = len(self._digests) // _DIGEST_BYTES
        # Counted before it is written, so that a write whose answer was lost is discarded as well.
        self._digests += hashlib.sha256(chunk).digest()
        await self._client.set(keys.staged(self._sha256, self._upload, index), chunk, ex=self._ttl_s)


def decode_blob(fields: Mapping[bytes, bytes], *, sha256: str) -> BlobInfo | None:
    """A blob's facts from its hash; None when there is no such blob."""
    if not fields:
        return None
    try:
        info = BlobInfo(
            sha256=fields[b"sha256"].decode(),
            size_bytes=int(fields[b"size_bytes"]),
            chunk_digests=fields[b"chunk_digests"],
        )
    except (KeyError, ValueError) as error:
        raise DataCorrupted("the stored facts of a tensor file cannot be read") from error
    if info.sha256 != sha256 or info.num_chunks != -(-info.size_bytes // CHUNK_BYTES):
        raise DataCorrupted("the stored facts of a tensor file do not belong to it")
    return info


async def read_uses(pipe: Pipeline, sha256s: Sequence[str]) -> dict[str, BlobUse]:
    """What must be known of blobs to delete them; without those that are not there, or whose users are unknown."""
    # Other facts may be damaged: nobody can read the blob then, and it must not hold fast who used it.
    found = await read_fields(pipe, [keys.blob(sha256) for sha256 in sha256s], "num_versions", "chunk_digests")
    return {
        sha256: BlobUse(num_versions=int(num_versions), num_chunks=len(digests or b"") // _DIGEST_BYTES)
        for sha256, (num_versions, digests) in zip(sha256s, found, strict=True)
        if num_versions and num_versions.isdigit()
    }


def chunk_of(offset: int) -> int:
    """The chunk of a blob that an offset lies in."""
    return max(0, offset) // CHUNK_BYTES


class BlobReader:
    """Read published blobs."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def read(
        self, sha256: str, *, offset: int, start: BlobStart | None = None
    ) -> AsyncIterator[tuple[int, bytes]]:
        """A blob's bytes from an offset, as (offset, piece); each chunk is compared with its sha256 first.

        Args:
            start: its facts with the chunk that the offset lies in, where they were read already.

        Raises:
            AdapterNotFound: there is no such blob, or it was deleted while it was read.
            InvalidArgument: the offset lies beyond the file.
            DataCorrupted: a chunk is not what was stored; no byte of it is given out.
        """
        first = chunk_of(offset)
        if start is None:
            start = await self._start(sha256, first)
        info = decode_blob(start.facts, sha256=sha256)
        if info is None:
            raise _deleted()
        if not 0 <= offset <= info.size_bytes:
            raise InvalidArgument(f"offset must be 0 to {info.size_bytes}, the file's size", field="offset")
        chunk = start.chunk or b""
        digest = hashlib.sha256(chunk)
        pieces = [chunk[begin : begin + _PIECE_BYTES] for begin in range(0, len(chunk), _PIECE_BYTES)]
        for index in range(first, info.num_chunks):
            if digest.digest() != info.digest_of(index):
                if await self._info(sha256) is None:
                    raise _deleted()
                raise DataCorrupted("the stored tensors do not match their sha256; register the adapter again")
            # With each piece, one of the next chunk is read and checked: all of it at once would keep a processor
            # for milliseconds, which a step of the model may need.
            at, digest, following = index * CHUNK_BYTES, hashlib.sha256(), []
            for number, piece in enumerate(pieces):
                missing = max(0, offset - at)
                if missing < len(piece):
                    yield at + missing, piece[missing:]
                at += len(piece)
                if index + 1 < info.num_chunks:
                    following.append(await self._piece(sha256, index + 1, number))
                    digest.update(following[-1])
            pieces = following

    @reads
    async def _start(self, sha256: str, index: int) -> BlobStart:
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(keys.blob(sha256))
        pipe.get(keys.chunk(sha256, index))
        facts, chunk = await pipe.execute()
        return BlobStart(facts=facts, chunk=chunk)

    @reads
    async def _info(self, sha256: str) -> BlobInfo | None:
        return decode_blob(await reply(self._client.hgetall(keys.blob(sha256))), sha256=sha256)

    @reads
    async def _piece(self, sha256: str, index: int, number: int) -> bytes:
        """A part of a chunk; empty where there is none."""
        begin = number * _PIECE_BYTES
        piece: bytes = await reply(
            self._client.getrange(keys.chunk(sha256, index), begin, begin + _PIECE_BYTES - 1)
        )
        return piece


def _deleted() -> AdapterNotFound:
    return AdapterNotFound("the adapter was deleted", field="digest")
