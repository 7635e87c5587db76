"""Request bodies: sized before they are read, and JSON that means one thing only."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, TypeVar, get_args

import orjson
from softprompt_api.nesting import is_nested_deeper
from starlette.requests import ClientDisconnect, Request

from softprompt_gateway.errors import ClientGone, Refused
from softprompt_gateway.validation import RequestModel

Body = TypeVar("Body")

# What is read and thrown away so that a client that is still sending can read its answer.
_DISCARDED_BYTES = 16 * 2**20
# A larger body takes longer to parse and to check than others should wait.
_READ_AT_ONCE_BYTES = 64 * 2**10
# What a field allows is less.
_MAX_DEPTH = 256
# Objects and lists of one request that are looked through for what is unknown: no conversation has as many.
_MAX_LOOKED_THROUGH = 16 * 2**10


def content_length(request: Request) -> int | None:
    """The declared size of the body; h11 has checked that it is a number."""
    declared = request.headers.get("content-length")
    return None if declared is None else int(declared)


def check_encoding(request: Request, media_type: str) -> None:
    """Refuse a compressed body, and one declared as anything but `media_type`."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Refused(
            "send the body uncompressed; content-encoding is not supported",
            code="unsupported_media_type",
            status=415,
        )
    declared = request.headers.get("content-type", media_type).partition(";")[0].strip().lower()
    if declared != media_type:
        raise Refused(f"content-type must be {media_type}", code="unsupported_media_type", status=415)


async def body_chunks(request: Request, *, limit_bytes: int, timeout_s: float) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; more than `limit_bytes` is 413, to wait for it longer than `timeout_s` is 408."""
    is_too_large = (content_length(request) or 0) > limit_bytes
    received, left_s = 0, timeout_s
    stream = request.stream()
    chunk: bytes | None = b""
    try:
        while chunk is not None:
            begun_s = time.monotonic()
            # Not around the yield: whoever takes the chunks may take its time, and must not be cancelled here.
            async with asyncio.timeout(left_s):
                if is_too_large:
                    await discard(stream)
                    raise _too_large(limit_bytes)
                chunk = await anext(stream, None)
            left_s -= time.monotonic() - begun_s
            if chunk:
                received += len(chunk)
                is_too_large = received > limit_bytes
                if not is_too_large:
                    yield chunk
    except TimeoutError:
        raise Refused(
            f"the body did not arrive within {timeout_s:g} s",
            code="request_timeout",
            status=408,
            headers={"connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGone from None


async def discard(chunks: AsyncIterator[bytes]) -> None:
    """Read on for a while, so that the answer is not lost in a reset connection."""
    discarded = 0
    async for chunk in chunks:
        discarded += len(chunk)
        if discarded > _DISCARDED_BYTES:
            return


def _too_large(limit_bytes: int) -> Refused:
    return Refused(
        f"the body is larger than {limit_bytes} bytes",
        code="body_too_large",
        status=413,
        headers={"connection": "close"},
    )


async def read_json(
    request: Request, read: Callable[[dict[str, Any]], Body], *, limit_bytes: int, timeout_s: float
) -> Body:
    """What `read` makes of the body, a JSON object."""
    check_encoding(request, "application/json")
    body = b"".join([chunk async for chunk in body_chunks(request, limit_bytes=limit_bytes, timeout_s=timeout_s)])
    if len(body) <= _READ_AT_ONCE_BYTES:
        return read(parse_object(body))
    return await asyncio.to_thread(lambda: read(parse_object(body)))


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse strict JSON whose top is an object.

    Refused: anything but UTF-8, NaN and infinities, lone surrogates, trailing bytes, deep nesting, duplicate keys.
    """
    try:
        orjson.loads(body)  # knows every rule above but the last
        value = json.loads(body, object_pairs_hook=_unique)
    except orjson.JSONDecodeError as error:
        raise Refused(_not_json(body, error), code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise Refused("the body is not valid JSON: a number too long", code="invalid_json") from None
    # Most have fewer brackets, and nobody walks through thousands of token ids for nothing.
    if body.count(b"{") + body.count(b"[") > _MAX_DEPTH and is_nested_deeper(value, _MAX_DEPTH):
        raise _too_deep()
    if not isinstance(value, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    return value


def _too_deep() -> Refused:
    return Refused(f"the body is nested deeper than {_MAX_DEPTH}", code="invalid_json")


def _not_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    """What is wrong with a body; where bytes are not UTF-8, orjson tells no place, and calls it the first."""
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"the body is not UTF-8: byte {wrong.start} is 0x{body[wrong.start]:02x}"
    return f"the body is not valid JSON: {error}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Refused(f"the body has the key {twice[:64]!a} twice", code="invalid_json")
    return members


# An object of a request: a model, or the names that its members may have.
Kind = type[RequestModel] | frozenset[str]


@dataclass(frozen=True, slots=True)
class Holds:
    """Beside a field's type: which objects its own validator takes, where the type does not say so."""

    kinds: tuple[Kind, ...]


def leave_out_unknown(values: dict[str, Any], model: type[RequestModel]) -> Sequence[str]:
    """Take what a model does not know out of a request, however deep; where each was, the top's first.

    Of a request with very many objects the rest is left as it is, for the model to refuse.
    """
    places: list[str] = []
    # Not by recursion: lists may be nested as deep as JSON is read.
    inner: deque[tuple[str, Any, tuple[Kind, ...]]] = deque([("", values, (model,))])
    num_left = _MAX_LOOKED_THROUGH
    while inner and num_left:
        place, value, kinds = inner.popleft()
        num_left -= 1
        if isinstance(value, list):
            items = ((f"{place}{number}.", item, kinds) for number, item in enumerate(value) if _has_members(item))
            inner += islice(items, max(0, num_left - len(inner)))
        elif (kind := _meant(value, kinds)) is not None:
            fields = _fields(kind)
            for name in [name for name in value if name not in fields]:
                places.append(place + name)
                del value[name]
            for name, member in value.items():
                if fields[name] and _has_members(member):
                    inner.append((f"{place}{name}.", member, fields[name]))
    return places


def _has_members(value: object) -> bool:
    return isinstance(value, (dict, list))


def _meant(value: Mapping[str, Any], kinds: Sequence[Kind]) -> Kind | None:
    """What an object is taken for: of several kinds, the one that has its `type`."""
    if len(kinds) == 1:
        return kinds[0]
    return next((kind for kind in kinds if value.get("type") in _types(kind)), None)


@cache
def _types(kind: Kind) -> Sequence[object]:
    """What the `type` of such an object may be; None: that it may be absent."""
    field = None if isinstance(kind, frozenset) else kind.model_fields.get("type")
    if field is None:
        return ()
    words = [word for part in (field.annotation, *get_args(field.annotation)) for word in get_args(part)]
    return words if field.is_required() else [*words, None]


@cache
def _fields(kind: Kind) -> Mapping[str, tuple[Kind, ...]]:
    """The members that such an object may have, each with the objects that are in it."""
    if isinstance(kind, frozenset):
        return dict.fromkeys(kind, ())
    return {
        field.alias or name: tuple(_kinds((field.annotation, *field.metadata)))
        for name, field in kind.model_fields.items()
    }


def _kinds(annotations: Iterable[Any]) -> Iterator[Kind]:
    for annotation in annotations:
        if isinstance(annotation, Holds):
            yield from annotation.kinds
        elif isinstance(annotation, type) and issubclass(annotation, RequestModel):
            yield annotation
        else:
            yield from _kinds(get_args(annotation))
