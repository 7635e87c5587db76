"""A tensor file on its way from the registry: kept and checked as it comes, an adapter at the end."""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from softprompt_api.errors import AdapterInvalid, DataCorrupted, Overloaded
from softprompt_api.formats import AdapterSpec, AdapterVerifier
from softprompt_api.names import AdapterRef, with_task
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.channel import SMALL_FILE_BYTES
from softprompt_api.waiting import wait_for_shared

from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.engine.files import MemoryFile

_LARGE_FILE_BYTES = 2**22
# The engine gets larger ones without a copy, and each is a file that stays open.
_MAX_BUFFER_BYTES = 2**20
# What is kept beside one step; more of a file that would take too many.
_STEP_BYTES = 2**18
_MAX_STEPS = 64
# What is kept at once where no step is held up: for less, another thread is not worth the way to it.
_BATCH_BYTES = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an adapter's file must turn out to be."""

    version: pb.AdapterVersion
    spec: AdapterSpec
    task: int | None
    verifier: AdapterVerifier


@dataclass(slots=True, kw_only=True)
class Transfer:
    """A tensor file on its way.

    Attributes:
        wanted: known from its first message on.
        new: bytes that came last, and are neither kept nor checked yet.
        num_kept: bytes before these.
        file: has what is kept, where it becomes much; the engine is given it.
        buffer: has it otherwise.
        refusal: makes the error of bytes that no adapter may have; a raised one would keep them in memory.
    """

    ref: AdapterRef
    wanted: Wanted | None = None
    new: list[bytes] = field(default_factory=list)
    num_kept: int = 0
    file: MemoryFile | None = None
    buffer: bytearray = field(default_factory=bytearray)
    refusal: Callable[[], AdapterInvalid] | None = None

    @property
    def num_new(self) -> int:
        """Bytes that are not kept yet."""
        return sum(map(len, self.new))

    @property
    def num_bytes(self) -> int:
        """Bytes that came."""
        return self.num_kept + self.num_new

    @property
    def is_small(self) -> bool:
        """Whether its file is read sooner than another thread would have begun."""
        return self.wanted is not None and self.wanted.version.size_bytes <= SMALL_FILE_BYTES

    @property
    def is_large(self) -> bool:
        """Whether its file takes long beside steps."""
        return self.wanted is not None and self.wanted.version.size_bytes > _LARGE_FILE_BYTES

    def is_due(self, *, beside_step: bool) -> bool:
        """Whether what is new is to be kept before more is read; of a small file that is its end."""
        if self.wanted is None or self.is_small:
            return False
        if not beside_step:
            return self.num_new >= _BATCH_BYTES
        # What comes first has the header, which takes longest.
        most = max(_STEP_BYTES, self.wanted.version.size_bytes // _MAX_STEPS) if self.num_kept else 1
        return self.num_new >= most

    @property
    def data(self) -> bytearray | memoryview:
        """All that is kept."""
        return self.buffer if self.file is None else self.file.read()

    async def work(self, function: Callable[[], T]) -> T:
        """Call what works on the file, in another thread where it is large."""
        return function() if self.is_small else await _in_thread(function)

    def keep(self) -> None:
        """Keep and check what is new; whether it is what was registered is known at the end."""
        assert self.wanted is not None
        new, self.new = self.new, []
        for piece in new:
            if self.wanted.version.size_bytes > _MAX_BUFFER_BYTES:
                self._write(piece)
            else:
                self.buffer += piece
            self.num_kept += len(piece)
            if self.refusal is None:
                try:
                    self.wanted.verifier.feed(piece)
                except AdapterInvalid as error:
                    self.refusal = partial(type(error), error.message, field=error.field)

    def _write(self, piece: bytes) -> None:
        try:
            self.file = self.file or MemoryFile()
            self.file.write(piece)
        except OSError as error:
            raise Overloaded(
                f"there is no room in memory for the adapter now ({error.strerror}); try again later"
            ) from error

    def finish(self, wanted: Wanted, digest: str, dtype: str) -> Adapter:
        """What the whole file holds, verified; once only."""
        self.keep()
        version = wanted.version
        try:
            if self.refusal is not None:
                raise self.refusal()
            verified = wanted.verifier.finish()
        except AdapterInvalid as error:
            # The verifier hashes what it reads. Only where it refuses that is it hashed again, to tell why.
            if hashlib.sha256(self.data).hexdigest() != version.tensors_sha256:
                raise DataCorrupted("the adapter's bytes are not those that were registered") from error
            raise
        if verified.digest != version.digest:
            raise DataCorrupted("the adapter's digest is not that of its config and bytes")
        return Adapter.read(
            digest,
            wanted.spec,
            self.data,
            infos=verified.tensors,
            task=wanted.task,
            dtype=dtype,
            spelling=with_task(f"{version.name}@{version.version}", self.ref.task),
            file=self.file,
        )


async def _in_thread(function: Callable[[], T]) -> T:
    """As asyncio.to_thread, but it is cancelled only when the thread has ended, which has memory until then."""
    working = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await wait_for_shared(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise
