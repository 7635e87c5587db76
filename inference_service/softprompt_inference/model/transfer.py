"""Values between host and device, moved in the order of what the device computes and without a wait."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is loaded between two steps: about two milliseconds on a CPU, and one on a GPU.
PIECE_BYTES = {"cpu": 2**19, "cuda": 2**23}


def upload(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or lists of one length, on the device."""
    tensor = torch.tensor(np.asarray(values), dtype=dtype)  # which reads a list faster than torch
    # From memory that is not pinned, a copy may wait for all that the device has to do.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def upload_bytes(
    data: bytes | memoryview, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Raw little-endian values on the device, in a tensor of that shape and dtype; never to be written to."""
    if device.type == "cpu":
        view = memoryview(data)
        # torch warns of memory that cannot be written to, whatever is done with it.
        values = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)
        if values.data_ptr() % dtype.itemsize:  # as files may have them
            values = torch.frombuffer(bytearray(view), dtype=dtype)
        return values.view(tuple(shape))
    # Pinned, so that the steps of others need not wait for the copy; torch keeps the memory until it is done.
    staged = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
    staged.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, dtype=np.uint8)
    return staged.to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, behind what the device was told to do before; at least one."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tensors
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._copies = tuple(map(_to_pinned, tensors))
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def lists(self) -> list[list[Any]]:
        """Wait for them; each as `tolist` gives it."""
        self._wait()
        return [copy.tolist() for copy in self._copies]

    def rows_bytes(self) -> list[bytes]:
        """Wait for them; the raw values of each row of the first."""
        self._wait()
        return [row.contiguous().numpy().tobytes() for row in self._copies[0]]

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
