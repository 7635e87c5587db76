"""`embed_gather` in plain torch: the CPU path, and what the Triton kernel is held to."""

from torch import Tensor


def embed_gather(out: Tensor, rows: Tensor, dst: Tensor, src: Tensor) -> None:
    """Arguments as in `softprompt_kernels.embed_gather`."""
    keep = src >= 0
    out[dst[keep]] = rows[src[keep]]
