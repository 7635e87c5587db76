"""Messages between front and engine as bytes: a length, then msgpack of (kind, message).

    frame = length of the body: 4 bytes, little-endian | body

Decoding checks every type; nothing in a frame can name code.
"""

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from softprompt_api.params import SamplingParams

from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import (
    Abort,
    AbortSearch,
    AddRequest,
    DropAdapter,
    FindNearest,
    LoadAdapter,
    LoadLora,
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


Message = (
    EngineConfig
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
    "config": EngineConfig,
    "add": _AddRequest,
    "abort": Abort,
    "load": LoadAdapter,
    "load-lora": LoadLora,
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
    return _frame(_KIND_OF[type(message)], message)


def _frame(kind: str, message: object) -> bytes:
    body = _ENCODER.encode((kind, message))
    return HEADER.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """The message of a frame's body; raises msgspec.DecodeError when it is none of ours."""
    kind, raw = _ENVELOPE.decode(body)
    if kind not in _DECODERS:
        raise msgspec.DecodeError(f"unknown kind of message: {kind!r}")
    message: Message | _AddRequest = _DECODERS[kind].decode(raw)
    return _from_wire(message) if isinstance(message, _AddRequest) else message


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
