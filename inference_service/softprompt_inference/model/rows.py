"""The rows of resident adapters on the device, and which row a virtual token's id stands for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_inference.engine.messages import LoadAdapter
from softprompt_inference.model.hardware import DTYPES
from softprompt_inference.model.transfer import upload, upload_bytes

_FIRST_CAPACITY = 256


class VirtualRows:
    """One tensor for all adapters; it doubles when full, and freed rows are used again.

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
        """Forget the rows that were loaded at first_id."""
        count = self._num_rows_at.pop(first_id)
        self._free += [self._row_of.pop(first_id + i) for i in range(count)]

    def find(self, virtual_ids: Sequence[int]) -> list[int]:
        """Index into `rows` of each id."""
        return [self._row_of[virtual_id] for virtual_id in virtual_ids]

    def _decode(self, adapter: LoadAdapter) -> Tensor:
        """[num_virtual_tokens, hidden] in the model's dtype."""
        shape = (adapter.num_virtual_tokens, self.rows.shape[1])
        return upload_bytes(adapter.rows, shape, DTYPES[adapter.dtype], self.rows.device).to(self.rows.dtype)

    def _grow(self) -> None:
        capacity = len(self.rows)
        self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
        self._free += range(capacity, 2 * capacity)
