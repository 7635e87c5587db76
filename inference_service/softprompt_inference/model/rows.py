"""The rows of adapters that are loaded: embeddings on the device, and keys and values until a step writes them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softprompt_inference.engine.messages import LoadAdapter
from softprompt_inference.model.hardware import DTYPES
from softprompt_inference.model.transfer import PIECE_BYTES, upload, upload_bytes

_FIRST_CAPACITY = 256


class VirtualRows:
    """Embeddings: one tensor for all adapters; it doubles when full, and freed rows are used again.

    rows  [capacity, hidden]
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(_FIRST_CAPACITY, hidden_size, dtype=dtype, device=device)
        self._row_of: dict[int, int] = {}
        self._num_rows_at: dict[int, int] = {}
        self._free = list(range(_FIRST_CAPACITY))

    def load(self, first_id: int, adapter: LoadAdapter) -> None:
        """Make ids first_id … first_id + num_virtual_tokens − 1 stand for rows that have been checked."""
        rows = self._decode(adapter)
        while len(self._free) < len(rows):
            self._grow()
        places = [self._free.pop() for _ in range(len(rows))]
        self.rows[upload(places, torch.int64, self.rows.device)] = rows
        self._row_of.update({first_id + i: place for i, place in enumerate(places)})
        self._num_rows_at[first_id] = len(rows)

    def drop(self, first_id: int) -> None:
        """Forget the rows that were loaded at first_id, if any were."""
        count = self._num_rows_at.pop(first_id, 0)
        self._free += [self._row_of.pop(first_id + i) for i in range(count)]

    def find(self, virtual_ids: Sequence[int]) -> list[int]:
        """Index into `rows` of each id."""
        return [self._row_of[virtual_id] for virtual_id in virtual_ids]

    def rows_at(self, first_id: int) -> Tensor:
        """A copy of the rows that were loaded at first_id: [n, hidden]."""
        places = self.find(range(first_id, first_id + self._num_rows_at[first_id]))
        return self.rows[upload(places, torch.int64, self.rows.device)]

    def _decode(self, adapter: LoadAdapter) -> Tensor:
        """[num_virtual_tokens, hidden] in the model's dtype."""
        shape = (adapter.num_virtual_tokens, adapter.row_size)
        return upload_bytes(adapter.rows, shape, DTYPES[adapter.dtype], self.rows.device).to(self.rows.dtype)

    def _grow(self) -> None:
        capacity = len(self.rows)
        self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
        self._free += range(capacity, 2 * capacity)


class KeyValueRows:
    """Keys and values that adapters give, in host memory: once written, they are found in pages.

    Args:
        shape: (layers, key heads, head dimension) of the model.
        dtype: of its pages.
        device: that the pages are on; one that is no CPU copies them without the host waiting.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._rows_at: dict[int, Tensor] = {}

    def load(self, first_id: int, adapter: LoadAdapter) -> Iterator[None]:
        """Take rows that have been checked, piece by piece; they are there at the end."""
        layers, heads, head_dim = self._shape
        count, is_pinned = adapter.num_virtual_tokens, self._device.type == "cuda"
        placed = torch.empty(layers, 2, count, heads, head_dim, dtype=self._dtype, pin_memory=is_pinned)
        data, row_bytes = memoryview(adapter.rows), len(adapter.rows) // count
        num_rows = max(1, PIECE_BYTES[self._device.type] // row_bytes)
        for start in range(0, count, num_rows):
            if start:
                yield
            piece = data[start * row_bytes : (start + num_rows) * row_bytes]
            shape = (len(piece) // row_bytes, layers, 2, heads, head_dim)
            rows = upload_bytes(piece, shape, DTYPES[adapter.dtype], torch.device("cpu"))
            placed[:, :, start : start + num_rows] = rows.permute(1, 2, 0, 3, 4)
        self._rows_at[first_id] = placed

    def drop(self, first_id: int) -> None:
        """Forget the rows that were loaded at first_id, if any were."""
        self._rows_at.pop(first_id, None)

    def find(self, first_id: int) -> Tensor:
        """All that was loaded at first_id: [layers, 2, n, Hkv, D]. A part could not be copied without a wait."""
        return self._rows_at[first_id]
