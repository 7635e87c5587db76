"""How many programs a device computes at the same time, for kernels that cut their work accordingly."""

import functools

import torch


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where kernels are only tried."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
