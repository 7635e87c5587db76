"""The header of a safetensors file, checked before anything is sized by it.

A file is 8 bytes of header length (little endian), the header (JSON), then the tensors' bytes, which must follow
each other from 0 to the end of the file without holes or overlaps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats.checks import found, printable
from softprompt_api.formats.strict_json import parse_object
from softprompt_api.names import shown

Shape = tuple[int, ...]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 4096
_MAX_DIMENSIONS = 8

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

_SAVE = "save with save_pretrained(safe_serialization=True)"
_FETCH = "fetch the file itself"
# What people upload instead, and what to do; the first bytes tell, whatever the file is called.
_FOREIGN = (
    (b"PK\x03\x04", "a zip or torch (.bin, .pt) file", _SAVE),
    (b"\x80", "a pickle or torch (.bin, .pt) file", _SAVE),
    (b"GGUF", "a GGUF file", _SAVE),
    (b"\x93NUMPY", "a numpy file", _SAVE),
    (b"\x89HDF", "an HDF5 file", _SAVE),
    (b"\x1f\x8b", "a gzip file", _SAVE),
    (
        b"version https://git-lfs",
        "a git-lfs pointer and not the file it stands for",
        f"{_FETCH} with `git lfs pull`",
    ),
    (b"{", "a JSON file", _SAVE),
    (b"<", "an HTML or XML page", _FETCH),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a file: its dtype as safetensors spells it, its shape, its bytes after the header."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


def header_length(start: bytes, *, size_bytes: int) -> int:
    """The header's length from a file's first 8 bytes; AdapterInvalid if this cannot be a safetensors file."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    plausible = len(start) >= LENGTH_BYTES and 2 <= length <= size_bytes - LENGTH_BYTES
    if plausible and length <= MAX_HEADER_BYTES:
        return length
    for magic, what, remedy in _FOREIGN:
        if start.startswith(magic[:LENGTH_BYTES]):
            raise _invalid(f"this is {what}, not safetensors; {remedy}")
    if plausible:
        raise _invalid(f"the safetensors header has {length} bytes; at most {MAX_HEADER_BYTES}")
    raise _invalid("not a safetensors file: its header does not fit into the file")


def parse_header(text: bytes | bytearray, *, data_bytes: int) -> list[TensorInfo]:
    """The tensors in a header, in order of their bytes; AdapterInvalid if header and data disagree.

    Args:
        text: the header without its length.
        data_bytes: how many bytes follow the header.
    """
    header = parse_object(text, what="the safetensors header", field="tensors")
    if not text.startswith(b"{"):
        raise _invalid("the safetensors header does not begin with '{'")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(f"the safetensors metadata is {found(metadata)}; supported: a map of texts")
    if len(header) > MAX_TENSORS:
        raise _invalid(f"the file has {len(header)} tensors; at most {MAX_TENSORS}")
    tensors = sorted(
        (_tensor(name, entry) for name, entry in header.items()), key=lambda info: (info.begin, info.end)
    )
    position = 0
    for info in tensors:
        if info.begin != position:
            problem = "overlaps another tensor" if info.begin < position else "leaves a hole before it"
            raise tensor_invalid(info.name, problem)
        position = info.end
    if position != data_bytes:
        raise _invalid(f"the tensors take {position} bytes, but {data_bytes} follow the header")
    return tensors


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise tensor_invalid(name, f"has the entry {found(entry)}; supported: dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise tensor_invalid(name, f"has dtype {found(dtype)}; supported: F32, F16, BF16")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise tensor_invalid(name, f"has shape {found(shape)}; supported: at most {_MAX_DIMENSIONS} whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise tensor_invalid(name, f"has data_offsets {found(offsets)}; supported: a list of begin and end")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise tensor_invalid(name, f"of shape {shape} and dtype {dtype} cannot take {end - begin} bytes")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def tensor_invalid(name: str, problem: str) -> AdapterInvalid:
    """The error for one tensor of the file."""
    return AdapterInvalid(f"tensor {shown(name)} {problem}", field=f"tensors.{printable(name)}")


def _invalid(problem: str) -> AdapterInvalid:
    return AdapterInvalid(problem, field="tensors")
