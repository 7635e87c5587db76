"""How many programs a device computes at the same time, and into how many parts work is cut for that."""

import functools

import torch


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where kernels are only tried."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan_parts(num_programs: int, *, wanted: int, most: int) -> int:
    """Into how many parts each of some programs is cut: a power of two, from shapes alone.

    So a captured launch holds for every step.

    Args:
        wanted: programs that fill the device.
        most: parts that one can be cut into.
    """
    return 1 << max(min(wanted // max(num_programs, 1), most), 1).bit_length() - 1
