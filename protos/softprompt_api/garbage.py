"""The garbage collector of a process that serves: services turn it off while they start."""

import gc


def start_collecting() -> None:
    """Collect garbage from now on, among what is made from now on: what exists lives as long as the process."""
    gc.collect()
    gc.freeze()
    gc.enable()
