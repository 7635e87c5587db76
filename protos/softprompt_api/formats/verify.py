"""A tensor file checked while it streams past, in constant memory; and what one holds that was checked."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import safetensors_header as safetensors
from softprompt_api.formats.content import Content
from softprompt_api.formats.norms import RowNorms
from softprompt_api.formats.safetensors_header import TensorInfo, tensor_invalid
from softprompt_api.formats.spec import AdapterSpec, ModelShape, RawTensor
from softprompt_api.formats.values import FLOAT_DTYPES, FileScan, ValueScan
from softprompt_api.names import shown
from softprompt_api.quality import Norms

_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedAdapter:
    """What is known of a tensor file that passed every check.

    Attributes:
        digest: "sha256:…", the identity of config and tensors.
        tensor_dtype: as safetensors spells it, for example "F32"; several where tensors differ: "BF16, F32".
        rank: the highest of a LoRA; 0 for other kinds.
        size_bytes: size of the file.
        sha256: hex, of the file.
        tensors: what is in it, by name, in order of their bytes.
        row_norms: of the rows that stand for token embeddings; None for kinds without such rows, and where nobody
            asked for them.
    """

    digest: str
    tensor_dtype: str
    rank: int
    size_bytes: int
    sha256: str
    tensors: Mapping[str, TensorInfo]
    row_norms: Norms | None = None


def adapter_digest(spec: AdapterSpec, sha256: str) -> str:
    """The identity of an adapter: its config as far as it changes the maths, and its tensor file's sha256."""
    return "sha256:" + hashlib.sha256(f"{spec.canonical_config}\n{sha256}".encode()).hexdigest()


class AdapterVerifier:
    """Check a tensor file against its spec; feed it the file in order, in pieces of any size.

    Every check happens at the first byte that allows it, so that a bad upload ends early. All errors are
    AdapterInvalid with the field at fault.

    Args:
        spec: the parsed config.
        size_bytes: size of the file.
        sha256: hex digest the file must have; None: not known.
        model: the base model it is for.
        all_tasks: check at the end also what is computed of the tensors for each task, where that takes seconds
            at most, and 64 MiB; otherwise `read_adapter` does, for the task that it is asked for.
        with_norms: measure the rows' norms.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        *,
        size_bytes: int,
        sha256: str | None = None,
        model: ModelShape | None = None,
        all_tasks: bool = False,
        with_norms: bool = False,
    ) -> None:
        self._model = model or ModelShape()
        spec.check_fits(self._model)
        self._spec = spec
        self._size_bytes = size_bytes
        self._expected_sha256 = sha256
        self._hash = hashlib.sha256()
        self._num_fed = 0
        self._head = bytearray()
        self._head_bytes = safetensors.LENGTH_BYTES
        self._length_known = False
        self._tensors: dict[str, TensorInfo] | None = None
        self._scan: FileScan | None = None
        self._with_norms = with_norms
        self._norms: RowNorms | None = None
        self._kept = bytearray() if all_tasks and spec.can_check_tasks() else None

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the file's next bytes."""
        view = memoryview(chunk).cast("B")
        if self._num_fed + len(view) > self._size_bytes:
            raise AdapterInvalid(
                f"more bytes were sent than the {self._size_bytes} announced", field="tensors_size_bytes"
            )
        for start in range(0, len(view), _PIECE_BYTES):
            self._take(view[start : start + _PIECE_BYTES])

    def finish(self) -> VerifiedAdapter:
        """Say what was verified, once the whole file was fed."""
        if self._num_fed != self._size_bytes:
            raise AdapterInvalid(
                f"{self._num_fed} bytes were sent, but {self._size_bytes} were announced",
                field="tensors_size_bytes",
            )
        if self._num_fed < safetensors.LENGTH_BYTES:  # raises, and names the format where it knows it
            safetensors.header_length(bytes(self._head), size_bytes=self._size_bytes)
        assert self._tensors is not None
        assert self._scan is not None
        assert self._scan.is_done
        sha256 = self._hash.hexdigest()
        if self._expected_sha256 is not None and sha256 != self._expected_sha256:
            raise AdapterInvalid(
                f"the tensors' sha256 is {sha256}, but {shown(self._expected_sha256)} was announced",
                field="tensors_sha256",
            )
        if self._kept is not None:
            kept = memoryview(self._kept)
            tensors = {
                name: RawTensor(info=info, data=kept[info.begin : info.end])
                for name, info in self._tensors.items()
            }
            self._spec.check_tasks(tensors, dtype=self._model.dtype)
        return VerifiedAdapter(
            digest=adapter_digest(self._spec, sha256),
            tensor_dtype=", ".join(sorted({info.dtype for info in self._tensors.values()})),
            rank=self._spec.max_rank(self._tensors),
            size_bytes=self._size_bytes,
            sha256=sha256,
            tensors=self._tensors,
            row_norms=self._norms.norms() if self._norms else None,
        )

    def _take(self, piece: memoryview) -> None:
        self._hash.update(piece)
        self._num_fed += len(piece)
        while self._tensors is None and piece:
            missing = self._head_bytes - len(self._head)
            self._head += piece[:missing]
            piece = piece[missing:]
            if len(self._head) == self._head_bytes:
                self._read_head()
        if self._kept is not None:
            self._kept += piece
        if self._scan is not None:
            self._scan.feed(piece)

    def _read_head(self) -> None:
        if not self._length_known:
            self._length_known = True
            self._head_bytes += safetensors.header_length(bytes(self._head), size_bytes=self._size_bytes)
            return
        header = self._head[safetensors.LENGTH_BYTES :]
        data_bytes = self._size_bytes - self._head_bytes
        self._tensors = _checked_tensors(self._spec, header, data_bytes=data_bytes)
        rank = self._spec.max_rank(self._tensors)
        if rank > self._model.max_lora_rank:
            raise AdapterInvalid(
                f"the adapter has rank {rank}; at most {self._model.max_lora_rank} is served", field="config.r"
            )
        embeddings = self._spec.embeddings()
        if self._with_norms and embeddings in self._tensors:
            self._norms = RowNorms(*self._tensors[embeddings].shape)
        self._scan = FileScan(
            ValueScan(info, self._model.dtype, self._norms if name == embeddings else None)
            for name, info in self._tensors.items()
        )
        self._head.clear()


def read_adapter(
    spec: AdapterSpec,
    data: bytes | bytearray | memoryview,
    *,
    infos: Mapping[str, TensorInfo] | None = None,
    task: int | None = None,
    dtype: str = "",
) -> Content:
    """What a complete file holds that an AdapterVerifier passed; it may be a part of the file's memory.

    Args:
        infos: its tensors, where they are known.
        task, dtype: as in AdapterSpec.read.
    """
    infos = infos or read_infos(spec, data)
    view = memoryview(data)[len(data) - max(info.end for info in infos.values()) :]
    tensors = {name: RawTensor(info=info, data=view[info.begin : info.end]) for name, info in infos.items()}
    return spec.read(tensors, task=task, dtype=dtype)


def read_infos(spec: AdapterSpec, data: bytes | bytearray | memoryview) -> Mapping[str, TensorInfo]:
    """The tensors of a complete file that an AdapterVerifier passed."""
    start = safetensors.LENGTH_BYTES + safetensors.header_length(
        bytes(data[: safetensors.LENGTH_BYTES]), size_bytes=len(data)
    )
    header = bytes(data[safetensors.LENGTH_BYTES : start])
    return _checked_tensors(spec, header, data_bytes=len(data) - start)


def _checked_tensors(spec: AdapterSpec, header: bytes | bytearray, *, data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors in order of their bytes, if the file has exactly those, and shaped as the config says."""
    found = {info.name: info for info in safetensors.parse_header(header, data_bytes=data_bytes)}
    expected = spec.expected_tensors(found)
    for name in found.keys() - expected.keys():
        raise tensor_invalid(name, f"is unknown in a {spec.kind} adapter; supported: {', '.join(expected)}")
    for name, shape in expected.items():
        if name not in found:
            raise tensor_invalid(name, f"is missing; the file has {shown(', '.join(found) or 'none')}")
        info = found[name]
        if info.dtype not in FLOAT_DTYPES:
            raise tensor_invalid(name, f"has dtype {info.dtype}; supported: {', '.join(FLOAT_DTYPES)}")
        if info.shape != shape:
            raise tensor_invalid(name, f"has shape {list(info.shape)}, but the config says {list(shape)}")
    return found
