"""The values of tensors, scanned as they stream past: finite, also in the serving dtype, and not all zero."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import numpy as np

from softprompt_api.formats.norms import RowNorms
from softprompt_api.formats.safetensors_header import ITEM_BYTES, TensorInfo, tensor_invalid

# safetensors dtype to the name used everywhere else.
FLOAT_DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Without their sign, the bits of values are in order of magnitude, and those of infinity and NaN above all others.
_WITHOUT_SIGN: Mapping[int, np.ndarray] = {2: np.array(0x7FFF, dtype="<u2"), 4: np.array(0x7FFFFFFF, dtype="<u4")}

# The smallest magnitude that rounds to infinity: halfway from a dtype's largest value to the next power of two.
# All are values of float32.
_OVERFLOW: Mapping[str, float] = {"float32": np.inf, "float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119}
# The largest magnitude that rounds to zero in a dtype: half its smallest subnormal (ties go to even, to zero).
_UNDERFLOW: Mapping[str, float] = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-134}


class FileScan:
    """Watch the tensors of a file go by, in any pieces, each as ValueScan does.

    Args:
        scans: of the tensors, in order of their bytes.
    """

    def __init__(self, scans: Iterable["ValueScan"]) -> None:
        self._scans = deque(scans)

    @property
    def is_done(self) -> bool:
        """Whether all tensors were seen to their ends."""
        return not self._scans

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes; AdapterInvalid at the first value that cannot be served."""
        while piece:
            # A LoRA has hundreds of tensors: to look at each by itself takes three times as long.
            alike = self._find_alike(len(piece))
            num_bytes = sum(scan.missing_bytes for scan in alike)
            if alike and _are_sound(alike, piece[:num_bytes]):
                piece = piece[num_bytes:]
                for _ in alike:
                    self._scans.popleft()
            else:
                for _ in range(max(1, len(alike))):
                    piece = self._feed_next(piece)

    def _find_alike(self, num_bytes: int) -> Sequence["ValueScan"]:
        """The next tensors that can be looked at as one array, as far as they lie within so many bytes."""
        alike: list[ValueScan] = []
        for scan in self._scans:
            num_bytes -= scan.missing_bytes
            if num_bytes < 0 or not scan.is_plain or scan.info.dtype != self._scans[0].info.dtype:
                break
            alike.append(scan)
        return alike

    def _feed_next(self, piece: memoryview) -> memoryview:
        """Give the next tensor its part of a piece; the rest."""
        scan = self._scans[0]
        taken, rest = piece[: scan.missing_bytes], piece[scan.missing_bytes :]
        scan.feed(taken)
        if not scan.missing_bytes:
            scan.finish()
            self._scans.popleft()
        return rest


def _are_sound(scans: Sequence["ValueScan"], data: memoryview) -> bool:
    """Whether ValueScan would refuse none of some plain tensors of one dtype, which lie one behind the other."""
    dtype, limits = scans[0].info.dtype, scans[0].limits
    sizes = [scan.missing_bytes // ITEM_BYTES[dtype] for scan in scans]
    starts = list(accumulate(sizes[:-1], initial=0))
    largest = as_float32(np.maximum.reduceat(_magnitudes(data, dtype), starts).tobytes(), dtype)
    return bool(((largest > limits[0]) & (largest < limits[1])).all())  # NaN is below none


class ValueScan:
    """Watch one float tensor's bytes go by, in any pieces.

    Args:
        info: the tensor, of dtype F32, F16 or BF16.
        serving_dtype: "float32", "float16", "bfloat16", or "" when not known.
        norms: sums up its rows; None: they are not wanted.

    Attributes:
        missing_bytes: those of the tensor that were not fed yet.
        limits: its largest magnitude must lie between these two.
    """

    def __init__(self, info: TensorInfo, serving_dtype: str, norms: RowNorms | None = None) -> None:
        self.info = info
        self._dtype = serving_dtype or "float32"
        self._norms = norms
        self._rest = b""
        self._num_seen = 0
        self._largest = 0.0
        self.limits = (_UNDERFLOW[self._dtype], _OVERFLOW[self._dtype])
        self.missing_bytes = info.end - info.begin

    @property
    def is_plain(self) -> bool:
        """Whether it has values, of which none was fed and nothing but their magnitudes is wanted."""
        return self._norms is None and self.missing_bytes == self.info.end - self.info.begin > 0

    def feed(self, piece: memoryview) -> None:
        """Take the next of the missing bytes; AdapterInvalid at the first value that cannot be served."""
        self.missing_bytes -= len(piece)
        assert self.missing_bytes >= 0
        item_bytes = ITEM_BYTES[self.info.dtype]
        if self._rest:
            needed = item_bytes - len(self._rest)
            self._rest += bytes(piece[:needed])
            piece = piece[needed:]
            if len(self._rest) < item_bytes:
                return
            self._scan(self._rest)
            self._rest = b""
        whole = len(piece) // item_bytes * item_bytes
        if whole:
            self._scan(piece[:whole])
        self._rest = bytes(piece[whole:])

    def finish(self) -> None:
        """Raise AdapterInvalid for a tensor that would do nothing."""
        if self._largest == 0.0:
            raise tensor_invalid(self.info.name, "is all zeros")
        if self._largest <= self.limits[0]:
            raise tensor_invalid(self.info.name, f"becomes all zeros in {self._dtype}, the serving dtype")

    def _scan(self, data: memoryview | bytes) -> None:
        bits = _magnitudes(data, self.info.dtype)
        largest = float(as_float32(bits.max().tobytes(), self.info.dtype)[0])
        if not largest < self.limits[1]:
            self._refuse(as_float32(data, self.info.dtype))
        self._largest = max(self._largest, largest)
        self._num_seen += len(bits)
        if self._norms is not None:
            self._norms.add(as_float32(data, self.info.dtype))

    def _refuse(self, values: np.ndarray) -> None:
        # Negated, so that NaN counts as too large.
        with np.errstate(invalid="ignore"):  # signalling NaNs
            index = int(np.argmax(~(np.abs(values) < self.limits[1])))
        row, column = divmod(self._num_seen + index, self.info.shape[-1])
        value = float(values[index])
        problem = f"has {value:g} at row {row}, column {column}"
        if np.isfinite(value):
            problem += f", which is infinite in {self._dtype}, the serving dtype"
        raise tensor_invalid(self.info.name, f"{problem}; supported: finite values")


def _magnitudes(data: memoryview | bytes, dtype: str) -> np.ndarray:
    """The bits of values without their sign, which are in order of magnitude. `[n]`"""
    # Not in float32: to convert every value takes ten times as long as to look at its bits.
    without_sign = _WITHOUT_SIGN[ITEM_BYTES[dtype]]
    magnitudes: np.ndarray = np.frombuffer(data, dtype=without_sign.dtype) & without_sign
    return magnitudes


def check_values(values: np.ndarray, name: str, serving_dtype: str) -> None:
    """Raise AdapterInvalid for a float32 matrix made of tensors, as ValueScan does for a tensor."""
    data = memoryview(values.astype("<f4").tobytes())
    scan = ValueScan(TensorInfo(name=name, dtype="F32", shape=values.shape, begin=0, end=len(data)), serving_dtype)
    scan.feed(data)
    scan.finish()


def as_float32(data: memoryview | bytes, dtype: str) -> np.ndarray:
    """Little-endian values of a safetensors float dtype as float32, exactly. `[n]`"""
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4")
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # signalling NaNs are found by the scan
            return np.frombuffer(data, dtype="<f2").astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
