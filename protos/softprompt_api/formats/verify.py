"""A tensor file checked while it streams past, in constant memory; and the rows of one that was checked."""

import hashlib
from dataclasses import dataclass

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import safetensors_header as safetensors
from softprompt_api.formats.config import FORMATS
from softprompt_api.formats.embedding import TENSOR
from softprompt_api.formats.safetensors_header import TensorInfo, tensor_invalid
from softprompt_api.formats.spec import AdapterSpec
from softprompt_api.formats.values import FLOAT_DTYPES, ValueScan
from softprompt_api.names import shown

_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedAdapter:
    """What is known of a tensor file that passed every check.

    Attributes:
        digest: "sha256:…", the identity of config and tensors.
        tensor_dtype: as safetensors spells it, for example "F32".
        size_bytes: size of the file.
        sha256: hex, of the file.
    """

    digest: str
    tensor_dtype: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of an embedding adapter, as they lie in the file.

    Attributes:
        data: `[num_virtual_tokens, hidden_size]`, row-major, little endian.
        dtype: "float32", "float16" or "bfloat16".
    """

    data: bytes
    dtype: str
    num_virtual_tokens: int
    hidden_size: int


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
        hidden_size: the base model's; None: not checked.
        max_virtual_tokens: most virtual tokens allowed; None or 0: no limit.
        dtype: the serving dtype; None or "": values must be finite as they are.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        *,
        size_bytes: int,
        sha256: str | None = None,
        hidden_size: int | None = None,
        max_virtual_tokens: int | None = None,
        dtype: str | None = None,
    ) -> None:
        if hidden_size is not None and spec.hidden_size != hidden_size:
            raise AdapterInvalid(
                f"the adapter was trained for hidden size {spec.hidden_size}, the base model has {hidden_size}",
                field="config.token_dim",
            )
        if max_virtual_tokens and spec.num_virtual_tokens > max_virtual_tokens:
            raise AdapterInvalid(
                f"the adapter has {spec.num_virtual_tokens} virtual tokens; at most {max_virtual_tokens} are "
                "allowed (max_prompt_adapter_token)",
                field="config.num_virtual_tokens",
            )
        self._spec = spec
        self._size_bytes = size_bytes
        self._expected_sha256 = sha256
        self._dtype = dtype or None
        self._hash = hashlib.sha256()
        self._num_fed = 0
        self._head = bytearray()
        self._head_bytes = safetensors.LENGTH_BYTES
        self._length_known = False
        self._info: TensorInfo | None = None
        self._scan: ValueScan | None = None

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
        assert self._info is not None
        assert self._scan is not None
        self._scan.finish()
        sha256 = self._hash.hexdigest()
        if self._expected_sha256 is not None and sha256 != self._expected_sha256:
            raise AdapterInvalid(
                f"the tensors' sha256 is {sha256}, but {shown(self._expected_sha256)} was announced",
                field="tensors_sha256",
            )
        return VerifiedAdapter(
            digest=adapter_digest(self._spec, sha256),
            tensor_dtype=self._info.dtype,
            size_bytes=self._size_bytes,
            sha256=sha256,
        )

    def _take(self, piece: memoryview) -> None:
        self._hash.update(piece)
        self._num_fed += len(piece)
        while self._scan is None and piece:
            missing = self._head_bytes - len(self._head)
            self._head += piece[:missing]
            piece = piece[missing:]
            if len(self._head) == self._head_bytes:
                self._read_head()
        if self._scan is not None and piece:
            self._scan.feed(piece)

    def _read_head(self) -> None:
        if not self._length_known:
            self._length_known = True
            self._head_bytes += safetensors.header_length(bytes(self._head), size_bytes=self._size_bytes)
            return
        header = self._head[safetensors.LENGTH_BYTES :]
        self._info = _checked_tensor(self._spec, header, data_bytes=self._size_bytes - self._head_bytes)
        self._scan = ValueScan(self._info, self._dtype)
        self._head.clear()


def read_rows(spec: AdapterSpec, data: bytes) -> Rows:
    """The rows in a complete file that an AdapterVerifier passed."""
    start = safetensors.LENGTH_BYTES + safetensors.header_length(
        data[: safetensors.LENGTH_BYTES], size_bytes=len(data)
    )
    info = _checked_tensor(spec, data[safetensors.LENGTH_BYTES : start], data_bytes=len(data) - start)
    return Rows(
        data=data[start + info.begin : start + info.end],
        dtype=FLOAT_DTYPES[info.dtype],
        num_virtual_tokens=spec.num_virtual_tokens,
        hidden_size=spec.hidden_size,
    )


def _checked_tensor(spec: AdapterSpec, header: bytes | bytearray, *, data_bytes: int) -> TensorInfo:
    """The embedding kinds' one tensor, if the file has exactly that with the shape the config says."""
    expected = FORMATS[spec.kind].tensors(spec)
    found = {info.name: info for info in safetensors.parse_header(header, data_bytes=data_bytes)}
    for name in found.keys() - expected.keys():
        raise tensor_invalid(name, f"is unknown in a {spec.kind} adapter, which has {', '.join(expected)} alone")
    for name, shape in expected.items():
        if name not in found:
            raise tensor_invalid(name, "is missing")
        info = found[name]
        if info.dtype not in FLOAT_DTYPES:
            raise tensor_invalid(name, f"has dtype {info.dtype}; supported: {', '.join(FLOAT_DTYPES)}")
        if info.shape != shape:
            raise tensor_invalid(name, f"has shape {list(info.shape)}, but the config says {list(shape)}")
    return found[TENSOR]
