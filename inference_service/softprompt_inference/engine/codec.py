"""Messages between front and engine as bytes: a length, then msgpack of (kind, message).

    frame = length of the body: 4 bytes, little-endian | body

The matrices of a LoRA are megabytes, and so are keys and values. They go beside the frame, in a file, and it has
their places there alone.
Decoding checks every type; nothing in a frame can name code.
"""

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import numpy as np
from softprompt_api.params import SamplingParams

from softprompt_inference.engine.config import EngineConfig, Prepare
from softprompt_inference.engine.files import MemoryFile
from softprompt_inference.engine.messages import (
    Abort,
    AbortSearch,
    AddRequest,
    DropAdapter,
    FindNearest,
    LoadAdapter,
    LoadLora,
    LoraModule,
    ModelInfo,
    Ping,
    SoftPromptPart,
    StepResult,
    TextPart,
)

HEADER = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The engine is starting; `text` says what it does now."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupFailed:
    """The engine could not start; `message` says why in plain words."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _AddRequest:
    """An AddRequest on the wire: a part is a list of ids or a digest, as msgpack cannot tell dataclasses apart."""

    request_id: str
    prompt: list[list[int] | str]
    params: SamplingParams
    eos_token_ids: list[int]
    seed: int
    salt: str
    tenant: str
    lora: str
    all_logprobs: bool


# Where a part of the file begins, and how many bytes it is.
_Place = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoadAdapter:
    """A LoadAdapter on the wire: with its rows, or with their place where they are keys and values."""

    digest: str
    rows: bytes | _Place
    dtype: str
    num_virtual_tokens: int
    row_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoraModule:
    """A LoraModule on the wire."""

    name: str
    rank: int
    scale: float
    a: _Place
    b: _Place


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoadLora:
    """A LoadLora on the wire."""

    digest: str
    modules: list[_LoraModule]
    dtype: str


Message = (
    Prepare
    | EngineConfig
    | AddRequest
    | Abort
    | LoadAdapter
    | LoadLora
    | DropAdapter
    | FindNearest
    | AbortSearch
    | Ping
    | Progress
    | StartupFailed
    | ModelInfo
    | StepResult
)

_KINDS: dict[str, type[Any]] = {
    "prepare": Prepare,
    "config": EngineConfig,
    "add": _AddRequest,
    "abort": Abort,
    "load": _LoadAdapter,
    "load-lora": _LoadLora,
    "drop": DropAdapter,
    "nearest": FindNearest,
    "abort-search": AbortSearch,
    "ping": Ping,
    "progress": Progress,
    "failed": StartupFailed,
    "info": ModelInfo,
    "step": StepResult,
}
_KIND_OF = {message_type: kind for kind, message_type in _KINDS.items()}
_ENCODER = msgspec.msgpack.Encoder()
_ENVELOPE = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_DECODERS = {kind: msgspec.msgpack.Decoder(message_type) for kind, message_type in _KINDS.items()}


def encode(message: Message) -> bytes:
    """The frame of a message."""
    if isinstance(message, AddRequest):
        return _frame("add", _to_wire(message))
    if isinstance(message, LoadLora):
        return _frame("load-lora", _without_matrices(message))
    if isinstance(message, LoadAdapter):
        return _frame("load", _without_key_values(message))
    return _frame(_KIND_OF[type(message)], message)


def contents_of(message: Message) -> MemoryFile | Sequence[bytes | memoryview]:
    """What goes beside the frame of a message, before it: a file, or what becomes one; most have nothing."""
    if isinstance(message, LoadLora):
        return message.file or [matrix for matrix in _matrices(message) if matrix]
    if isinstance(message, LoadAdapter) and message.are_key_values and message.rows:
        return message.file or [message.rows]
    return ()


def _frame(kind: str, message: object) -> bytes:
    body = _ENCODER.encode((kind, message))
    return HEADER.pack(len(body)) + body


def _nothing() -> NoReturn:
    raise msgspec.DecodeError("nothing came beside a message that needs it")


def decode(body: bytes | memoryview, take_contents: Callable[[], memoryview] = _nothing) -> Message:
    """The message of a frame's body; raises msgspec.DecodeError when it is none of ours.

    Args:
        take_contents: gets what came beside the frame, of messages that have something there.
    """
    kind, raw = _ENVELOPE.decode(body)
    if kind not in _DECODERS:
        raise msgspec.DecodeError(f"unknown kind of message: {kind!r}")
    message: Message | _AddRequest | _LoadAdapter | _LoadLora = _DECODERS[kind].decode(raw)
    match message:
        case _AddRequest():
            return _from_wire(message)
        case _LoadLora():
            return _with_matrices(message, take_contents)
        case _LoadAdapter():
            return _with_rows(message, take_contents)
        case _:
            return message


def _to_wire(request: AddRequest) -> _AddRequest:
    return _AddRequest(
        request_id=request.request_id,
        prompt=[part.token_ids if isinstance(part, TextPart) else part.digest for part in request.prompt],
        params=request.params,
        eos_token_ids=request.eos_token_ids,
        seed=request.seed,
        salt=request.salt,
        tenant=request.tenant,
        lora=request.lora,
        all_logprobs=request.all_logprobs,
    )


def _from_wire(request: _AddRequest) -> AddRequest:
    return AddRequest(
        request_id=request.request_id,
        prompt=[
            SoftPromptPart(digest=part) if isinstance(part, str) else TextPart(token_ids=part)
            for part in request.prompt
        ],
        params=request.params,
        eos_token_ids=request.eos_token_ids,
        seed=request.seed,
        salt=request.salt,
        tenant=request.tenant,
        lora=request.lora,
        all_logprobs=request.all_logprobs,
    )


def _matrices(lora: LoadLora) -> list[bytes | memoryview]:
    return [matrix for module in lora.modules for matrix in (module.a, module.b)]


def _without_matrices(lora: LoadLora) -> _LoadLora:
    places = iter(_places(lora.file, _matrices(lora)))
    return _LoadLora(
        digest=lora.digest,
        modules=[
            _LoraModule(name=each.name, rank=each.rank, scale=each.scale, a=next(places), b=next(places))
            for each in lora.modules
        ],
        dtype=lora.dtype,
    )


def _without_key_values(adapter: LoadAdapter) -> _LoadAdapter:
    return _LoadAdapter(
        digest=adapter.digest,
        rows=_places(adapter.file, [adapter.rows])[0] if adapter.are_key_values else bytes(adapter.rows),
        dtype=adapter.dtype,
        num_virtual_tokens=adapter.num_virtual_tokens,
        row_size=adapter.row_size,
    )


def _places(file: MemoryFile | None, parts: Sequence[bytes | memoryview]) -> list[_Place]:
    """Where parts of a file are; without one, they become it, one behind the other."""
    sizes = [len(part) for part in parts]
    if file is None:
        return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))  # the sum of all is no place
    start = _address(file.read())
    return [(_address(part) - start, size) for part, size in zip(parts, sizes, strict=True)]


def _address(part: bytes | memoryview) -> int:
    address: int = np.frombuffer(part, np.uint8).__array_interface__["data"][0]
    return address


def _take_parts(places: Sequence[_Place], take_contents: Callable[[], memoryview]) -> list[memoryview]:
    contents = take_contents() if any(size for _, size in places) else memoryview(b"")
    for begin, size in places:
        if min(begin, size) < 0 or begin + size > len(contents):
            raise msgspec.DecodeError(f"{size} bytes at {begin} of an adapter that came with {len(contents)}")
    return [contents[begin : begin + size] for begin, size in places]


def _with_rows(adapter: _LoadAdapter, take_contents: Callable[[], memoryview]) -> LoadAdapter:
    rows = adapter.rows
    return LoadAdapter(
        digest=adapter.digest,
        rows=rows if isinstance(rows, bytes) else _take_parts([rows], take_contents)[0],
        dtype=adapter.dtype,
        num_virtual_tokens=adapter.num_virtual_tokens,
        row_size=adapter.row_size,
        are_key_values=not isinstance(rows, bytes),
    )


def _with_matrices(lora: _LoadLora, take_contents: Callable[[], memoryview]) -> LoadLora:
    places = [place for module in lora.modules for place in (module.a, module.b)]
    matrices = iter(_take_parts(places, take_contents))
    return LoadLora(
        digest=lora.digest,
        modules=[
            LoraModule(name=each.name, rank=each.rank, scale=each.scale, a=next(matrices), b=next(matrices))
            for each in lora.modules
        ],
        dtype=lora.dtype,
    )
