"""Norms of a tensor's rows, summed while its values stream past."""

import numpy as np

from softprompt_api.quality import Norms

# Of larger tensors, which nobody serves, the first rows are measured: memory stays bounded.
_MAX_ROWS = 65_536


class RowNorms:
    """Squares of each row's values, in the order in which they come.

    Args:
        num_rows, row_size: shape of the tensor.
    """

    def __init__(self, num_rows: int, row_size: int) -> None:
        self._row_size = row_size
        self._squares = np.zeros(min(num_rows, _MAX_ROWS), dtype=np.float64)
        self._num_seen = 0

    def add(self, values: np.ndarray) -> None:
        """Take the next values, at least one."""
        first, offset = divmod(self._num_seen, self._row_size)
        starts = np.arange(-offset, len(values), self._row_size)
        starts[0] = 0
        measured = self._squares[first : first + len(starts)]
        if len(measured):
            measured += np.add.reduceat(np.square(values, dtype=np.float64), starts)[: len(measured)]
        self._num_seen += len(values)

    def norms(self) -> Norms:
        """The lowest, the median and the highest, once all values were taken."""
        norms = np.sort(np.sqrt(self._squares))
        # Not np.median, whose first call imports for longer than a whole adapter takes.
        middle = norms[(len(norms) - 1) // 2 : len(norms) // 2 + 1]
        return Norms(low=float(norms[0]), median=float(middle.mean()), high=float(norms[-1]))
